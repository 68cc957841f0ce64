"""Rows laid end to end in one forward: what keeps them apart, and which models can.

Each row's positions begin at 0. Flash attention attends within the bounds that are passed along,
`SDPA` within each row; from the positions transformers builds a mask for the rest.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from moc_cli.errors import MocError
from moc_cli.models.families import FAMILIES
from moc_cli.models.head import in_table
from moc_cli.nn.forward import Forward
from moc_cli.nn.packed import PackedRows

_BOUNDS = "cu_seq_lens_q"  # transformers' names
_LONGEST = "max_length_q"
_LENGTHS = "packed_row_lengths"  # ours: a tuple, so that nothing is read from the device
SDPA = "sdpa_by_row"


def check_packing(model: PreTrainedModel) -> None:
    """Raise MocError for a model in which tokens see those of the row before.

    The decoders of the table of families pass tests/training/test_packing.py.
    """
    if in_table(model):
        return
    can = ", ".join(sorted(name for name, family in FAMILIES.items() if family.placement.causal))
    raise MocError(
        f"train.packing: {type(model).__name__} ({model.config.model_type}) is not known to keep "
        f"rows apart that lie end to end; families that do: {can}",
        "leave train.packing out, or use a model of one of these families",
    )


def attend_by_row(model: PreTrainedModel) -> None:
    """Let a model that attends through sdpa do so within each packed row.

    With one mask for all rows together it would compute every row's product with every other.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(SDPA, _sdpa_by_row)
        AttentionMaskInterface.register(SDPA, sdpa_mask)
        model.set_attn_implementation(SDPA)


def _sdpa_by_row(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa for each packed row, (1, heads, T, d) -> (1, T, heads, d).

    Compiled, it attends by transformers' mask of all rows: one graph for rows of any lengths.
    """
    if torch.compiler.is_compiling() or _LENGTHS not in kwargs:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None
    lengths = kwargs.pop(_LENGTHS)
    outputs, first = [], 0
    parts = (states.split(lengths, dim=2) for states in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        mask, row = None, slice(first, first + q.shape[2])
        if attention_mask is not None and kwargs.get("sliding_window") is not None:
            mask = attention_mask[..., row, row]  # otherwise sdpa's own causal one
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
        first = row.stop
    return torch.cat(outputs, dim=1), None


def bounds(position_ids: Tensor) -> dict[str, Any]:
    """Return where rows begin and end, by their positions (1, T) on the CPU, as attention takes it:
    it does not have to ask the device then.
    """
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    ends = torch.cat([starts, starts.new_tensor([position_ids.shape[1]])]).int()
    lengths = tuple(ends.diff().tolist())
    flash = {_BOUNDS: ends, "cu_seq_lens_k": ends}
    return flash | {_LONGEST: max(lengths), "max_length_k": max(lengths), _LENGTHS: lengths}


def packed_forward(arguments: Mapping[str, Any], length: int, *, apart: bool) -> Forward | None:
    """Return the forward that begins with these arguments, where its one row of `length` tokens
    holds rows end to end; None where it does not.

    It has no padding and no generation. With `apart` each of the rows decides on its own routes.
    Without their bounds, only a forward without a mask is asked: the positions are then read from
    the device.
    """
    keys = ("position_ids", _BOUNDS, _LONGEST)
    positions, ends, longest = (arguments.get(key) for key in keys)
    if positions is None or len(positions) != 1:
        return None
    if ends is None or longest is None:
        if arguments.get("attention_mask") is not None:
            return None
        row_bounds = bounds(positions.cpu())
        ends, longest = row_bounds[_BOUNDS].to(positions.device), row_bounds[_LONGEST]
        if len(ends) < 3:
            return None
    if not apart or len(ends) < 3:
        return Forward(shape=(1, length))
    rows = PackedRows.of(ends, int(longest), length)
    return Forward(rows.valid, shape=(len(rows.valid), int(longest)), packed=rows)
