"""`moc train --dry-run`: everything short of weights, and one row as the loss will see it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from moc_cli.data.encode import IGNORED, Row, encode_train
from moc_cli.methods import Counts
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build
from moc_cli.training.contracts import total_steps
from moc_cli.training.rows import task_kind, training_data


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of a row that all are targets of the loss, or none of them."""

    text: str
    tokens: int
    target: bool


@dataclass(frozen=True)
class Preview:
    """What a run would train, for how long, and its first row; `label` is a classifier's."""

    counts: Counts
    steps: int
    rows: int
    truncated: int
    padding_share: float
    pieces: list[Piece]
    label: int | float | None

    def to_json(self) -> dict[str, Any]:
        """Return the preview as plain values; `share` is a fraction of the base."""
        return {
            "trainable": self.counts.trainable,
            "adapter": self.counts.adapter,
            "modules": self.counts.modules,
            "base": self.counts.base,
            "share": self.counts.share,
            "steps": self.steps,
            "rows": self.rows,
            "truncated": self.truncated,
            "padding_share": self.padding_share,
            "row": {"pieces": [asdict(piece) for piece in self.pieces], "label": self.label},
        }


def preview(recipe: Recipe) -> Preview:
    """Read the rows and the tokenizer, and place the method in the model's shapes.

    Raises MocError for all that would stop the run before its weights are read.
    """
    data = recipe.data
    rows = build.make_rows(data, recipe.eval.max_samples)
    tokenizer = build.make_tokenizer(recipe.model)
    adapted = build.build_shapes(recipe)
    kind = task_kind(data.suite, data.tasks[0])
    encoded = encode_train(
        rows.train, tokenizer, max_length=data.max_length, train_on_inputs=data.train_on_inputs
    )
    training = training_data(
        encoded,
        tokenizer,
        kind=kind,
        batch_size=recipe.train.per_device_train_batch_size,
        seed=recipe.seed,
        group_by_length=recipe.train.group_by_length,
    )
    first = encoded.rows[0]
    return Preview(
        counts=adapted.counts(),
        steps=total_steps(build.make_settings(recipe), training.batches),
        rows=len(encoded.rows),
        truncated=encoded.truncated,
        padding_share=training.padding_share,
        pieces=split_row(first, tokenizer, kind == "causal"),
        label=None if kind == "causal" else first["labels"],
    )


def split_row(row: Row, tokenizer: PreTrainedTokenizerBase, causal: bool) -> list[Piece]:
    """Decode a row in pieces, cut where targets begin or end.

    The first token of a language model's row is never a target: nothing comes before it. None of
    a classifier's tokens is one.
    """
    ids: Sequence[int] = row["input_ids"]
    targets = [False] * len(ids)
    if causal:
        targets[1:] = [label != IGNORED for label in row["labels"][1:]]
    pieces = []
    for target, group in groupby(zip(ids, targets, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in group]
        pieces.append(Piece(str(tokenizer.decode(tokens)), len(tokens), target))
    return pieces
