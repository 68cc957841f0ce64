"""Attention masks of a forward whose padding the host knows: nothing is read from the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


@contextmanager
def known_padding(mask: Tensor | None) -> Iterator[None]:
    """Within it models that attend through sdpa are told whether `mask` (B, T), on the CPU, marks
    padding.

    transformers looks for it in the mask on the device, because sdpa is faster without a mask, and
    the host waits for each look. The masks are the same.
    """
    if mask is None:
        yield
        return
    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = partial(_mask, bool(mask.all()))
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def _mask(all_real: bool, *args: Any, **kwargs: Any) -> Tensor | None:
    if all_real:
        kwargs["attention_mask"] = None
    elif kwargs.get("attention_mask") is not None:
        kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **kwargs)
