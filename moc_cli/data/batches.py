"""Which rows make a batch, and how they become tensors."""

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from moc_cli.data.encode import IGNORED, Row
from moc_cli.models.tokens import pad_token_id

POOL = 50  # batches whose rows are sorted by length together
Grouping = bool | Literal["even"]  # by length: similar ones in a batch, none, or even batches
Side = Literal["left", "right"]


class Batches:
    """Row numbers in batches, for each epoch in a new order, as a pure function of (seed, epoch).

    The rows are shuffled. With `group_by_length`, each pool of 50 batches of them is then sorted
    by length and cut into batches, and all batches are shuffled; with `even` it is sorted and dealt
    out, so that all batches have nearly as many tokens. The rows that fill no batch are the last,
    short one: drawn at random, so that no length is rarer in it than elsewhere.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        group_by_length: Grouping = True,
    ) -> None:
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.group_by_length = group_by_length

    def epoch(self, number: int) -> list[list[int]]:
        """Every row once, as batches of row numbers in the order of training."""
        rng = random.Random(f"batches {self.seed} {number}")
        rows = list(range(len(self.lengths)))
        rng.shuffle(rows)
        full = len(rows) // self.batch_size * self.batch_size
        rows, short = rows[:full], rows[full:]
        if self.group_by_length:
            size = POOL * self.batch_size
            pools = [rows[first : first + size] for first in range(0, full, size)]
            pools = [sorted(pool, key=self.lengths.__getitem__) for pool in pools]
            if self.group_by_length == "even":
                pools = [_dealt_out(pool, self.batch_size) for pool in pools]
            rows = [row for pool in pools for row in pool]
        batches = [
            rows[first : first + self.batch_size] for first in range(0, full, self.batch_size)
        ]
        if self.group_by_length:
            rng.shuffle(batches)
        return batches + ([short] if short else [])

    def positions(self) -> tuple[int, int]:
        """An epoch's token slots where batches are padded, and those without padding."""
        slots = real = 0
        for batch in self.epoch(0):
            lengths = [self.lengths[row] for row in batch]
            slots += len(lengths) * max(lengths)
            real += sum(lengths)
        return slots, real

    def padding_share(self) -> float:
        """The share of an epoch's token slots that hold padding: 0 where all lengths agree."""
        slots, real = self.positions()
        return 1 - real / slots if slots else 0.0


def _dealt_out(rows: list[int], batch_size: int) -> list[int]:
    """Rows sorted by length, in an order whose batches have nearly as many tokens: each batch gets
    a row of every stretch, the long ones of one where it got the short ones of the last.
    """
    batches = len(rows) // batch_size
    stretches = [rows[first : first + batches] for first in range(0, len(rows), batches)]
    turned = [part[::-1] if number % 2 else part for number, part in enumerate(stretches)]
    return [row for batch in zip(*turned, strict=True) for row in batch]


def as_tensors(row: Row) -> Row:
    """A row whose lists of numbers are tensors of 32-bit integers."""
    return {
        name: torch.tensor(value, dtype=torch.int32) if isinstance(value, list) else value
        for name, value in row.items()
    }


def collate(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, side: Side
) -> dict[str, Tensor]:
    """Pad rows as `pad_batch` does, and the labels of their tokens (B, T)."""
    batch = pad_batch(rows, tokenizer, side=side)
    batch["labels"] = pad_rows([row["labels"] for row in rows], IGNORED, side)
    return batch


def padding_tokenizer() -> PreTrainedTokenizerBase:
    """Return what batches of made-up rows need of a tokenizer: the ids of padding."""
    tokenizer: Any = SimpleNamespace(pad_token_id=0, pad_token_type_id=0, eos_token_id=None)
    return tokenizer  # type: ignore[no-any-return]


def pad_batch(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, side: Side
) -> dict[str, Tensor]:
    """Pad rows on one side to the longest: input_ids and attention_mask (B, T).

    `token_type_ids` are there if the rows have them. The mask alone says what padding is: a
    tokenizer without a pad token is padded with its end token.
    """
    fill = {"input_ids": pad_token_id(tokenizer), "token_type_ids": tokenizer.pad_token_type_id}
    batch = {
        name: pad_rows([row[name] for row in rows], fill[name], side)
        for name in fill
        if name in rows[0]
    }
    ones = [torch.ones(len(row["input_ids"]), dtype=torch.int32) for row in rows]
    batch["attention_mask"] = pad_rows(ones, 0, side)
    return batch


def pad_rows(rows: Sequence[Sequence[int] | Tensor], fill: int, side: Side) -> Tensor:
    """Rows as integers (B, T), padded with `fill` on one side to the longest.

    Rows that are tensors of 32-bit integers already take a quarter of the time.
    """
    tensors = [torch.as_tensor(row, dtype=torch.int32) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side).long()


def label_places(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the N positions after which a label is learned, and these labels; both (N,).

    `labels` are (B, T): the label at t is learned at t-1. Positions count through all rows.
    """
    rows, positions = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return rows * labels.shape[1] + positions, labels[rows, positions + 1]
