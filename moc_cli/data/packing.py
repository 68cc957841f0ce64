"""Rows of a language model laid end to end, without padding."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moc_cli.data.encode import IGNORED, Row


def pack(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Join rows to one: input_ids, position_ids and labels (1, T).

    Positions begin at 0 in each row. The first token of a row is never learned: nothing of its row
    comes before it.
    """
    columns: dict[str, list[Tensor]] = {"input_ids": [], "position_ids": [], "labels": []}
    for row in rows:
        ids, labels = (torch.as_tensor(row[name]) for name in ("input_ids", "labels"))
        columns["input_ids"].append(ids)
        columns["position_ids"].append(torch.arange(len(ids)))
        columns["labels"] += [labels.new_tensor([IGNORED]), labels[1:]]
    return {name: torch.cat(parts).long()[None] for name, parts in columns.items()}


def count_rows(batch: dict[str, Tensor]) -> int:
    """Return the rows of a batch, packed or padded."""
    if "attention_mask" in batch:
        return len(batch["input_ids"])
    return int((batch["position_ids"] == 0).sum())


def count_tokens(batch: dict[str, Tensor]) -> int:
    """Return the tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
