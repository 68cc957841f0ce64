"""Products of groups of rows, each with a matrix of its own, as experts make them.

Torch's shapes of them are for bfloat16 alone, and it does not count their operations.
"""

from typing import Any

import torch
from torch import Tensor

GROUPED = torch.ops.aten._grouped_mm.default


def grouped_product(
    first: Tensor,
    second: Tensor,
    offsets: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Return an empty result of `torch._grouped_mm`, in the type of `first` (or `out_dtype`).

    (M, K) x (G, K, N) gives (M, N): each group of rows has its matrix; (G, M, K) x (K, N) gives
    (M, N); (M, K) x (K, N), of which K is grouped, (G, M, N); (G, M, K) x (G, K, N) is (G, M, N).
    """
    groups = first.shape[:1] if first.ndim == 3 else offsets.shape if offsets is not None else ()
    shape = (first.shape[-2], second.shape[-1])
    return first.new_empty(
        (*groups, *shape) if first.ndim == second.ndim else shape, dtype=out_dtype or first.dtype
    )


def grouped_flops(first: Tensor, second: Tensor, *rest: Any, out_val: Tensor, **others: Any) -> int:
    """Return the operations of one such product: each row meets one matrix."""
    batches = first.shape[0] if first.ndim == second.ndim == 3 else 1
    return 2 * batches * first.shape[-2] * first.shape[-1] * second.shape[-1]
