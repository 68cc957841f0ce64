"""Attention masks: which tokens are real, and masks whose padding the host knows."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask


@contextmanager
def known_padding(mask: Tensor | None) -> Iterator[None]:
    """Within it models that attend through sdpa know whether `mask` (B, T), on the CPU, marks
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


def valid_tokens(mask: Any, length: int, past: int) -> Tensor | None:
    """Which of a forward's `length` new tokens are real: (B, T) bool, None where all are.

    The mask may be 2-D (B, past + T), a 4-D one prepared for a static cache, bool or additive
    (B, 1, T, keys), or a dict of those by attention type.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return None
    valid: Tensor
    if mask.ndim == 2:
        valid = mask[:, -length:].bool()
        return valid
    allowed = mask if mask.dtype == torch.bool else mask >= 0
    keys = allowed.shape[-1]
    # A token may attend to itself exactly if it is real. A rolling window keeps the last keys.
    first = past if keys >= past + length else keys - length
    rows = torch.arange(length, device=mask.device)
    valid = allowed[:, 0, rows, first + rows]
    return valid


def inside_padding(ids: Tensor, pad: int) -> Tensor | None:
    """Which tokens (B, T) are not pad tokens at an end of their row; None where all are inside.

    A row of pad tokens alone is taken as a text.
    """
    real = ids != pad
    inside = (real.cumsum(dim=1) > 0) & (real.flip(1).cumsum(dim=1).flip(1) > 0)
    inside |= ~real.any(dim=1, keepdim=True)
    return None if bool(inside.all()) else inside
