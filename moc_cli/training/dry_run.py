"""`moc train --dry-run`: all checks but loading weights, and one row as the loss will see it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.data.encode import IGNORED, Row
from moc_cli.data.splits import Splits
from moc_cli.errors import DataError, MocError
from moc_cli.methods import Counts
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build
from moc_cli.training.device_checks import check_device_keys, find_device
from moc_cli.training.loop_types import total_steps


@dataclass(frozen=True)
class Piece:
    """Neighbouring tokens of a row that all are targets of the loss, or none of them."""

    text: str
    tokens: int
    target: bool


@dataclass(frozen=True)
class Reading:
    """What the rows come to, and the first of them; `label` is a classifier's."""

    steps: int
    rows: int
    watched: int
    scored: int
    truncated: int
    answers_cut_off: int
    dropped: dict[str, dict[str, int]]
    padding_share: float
    positions: tuple[int, int]
    pieces: list[Piece]
    label: int | float | str | None
    notes: list[str]
    taken: dict[str, Any] | None


@dataclass(frozen=True)
class Preview:
    """What a run would train. `reading` is None where the hub was needed and out of reach: then
    `unread` says why. `published_shape`: the shapes counted are those that this package ships.
    """

    counts: Counts
    published_shape: bool
    reading: Reading | None
    unread: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the preview as plain values; `share` is a fraction of the base."""
        content: dict[str, Any] = {
            "trainable": self.counts.trainable,
            "adapter": self.counts.adapter,
            "modules": self.counts.modules,
            "base": self.counts.base,
            "share": self.counts.share,
            "published_shape": self.published_shape,
            "unread": self.unread,
        }
        read = self.reading
        if read is not None:
            content |= {
                "steps": read.steps,
                "rows": read.rows,
                "watched": read.watched,
                "scored": read.scored,
                "truncated": read.truncated,
                "answers_cut_off": read.answers_cut_off,
                "dropped": read.dropped,
                "padding_share": read.padding_share,
                "positions": dict(zip(("padded", "packed"), read.positions, strict=True)),
                "notes": read.notes,
                "taken": read.taken,
                "row": {"pieces": [asdict(piece) for piece in read.pieces], "label": read.label},
            }
        return content


def preview(recipe: Recipe) -> Preview:
    """Place the method in the model's shapes, then read the rows and the tokenizer.

    Raises MocError for all that would stop the run before its weights are read, but for rows or a
    tokenizer of the hub that cannot be had at present: those are only reported.
    """
    check_device_keys(recipe, find_device(recipe.launch.device), training=True)
    rows = None
    if recipe.data.suite == "custom":  # its rows say what the model has to be
        recipe, rows = build.read_rows(recipe)
    adapted = build.build_shapes(recipe)
    published = bool(getattr(adapted.model, "published_shape", False))
    try:
        reading, unread = _read(recipe, rows, adapted.model), None
    except OutOfReach as away:
        reading, unread = None, str(away)
    return Preview(adapted.counts(), published, reading, unread)


class OutOfReach(Exception):
    """The hub was needed for what only the run itself must have."""


def encode_within_reach(
    recipe: Recipe, splits: Splits | None, model: PreTrainedModel
) -> tuple[build.TrainingRows, PreTrainedTokenizerBase]:
    """Read the rows, if that is not done, and encode them as training would.

    Raises OutOfReach where rows or tokenizer are on a hub that cannot be had.
    """
    data = recipe.data
    try:
        splits = splits or build.read_rows(recipe)[1]
    except DataError as error:
        if data.path is not None or data.suite == "builtin":
            raise
        raise OutOfReach(error.message) from error
    try:
        tokenizer = build.make_tokenizer(recipe.model, recipe.data.chat_template)
    except MocError as error:
        if not getattr(model, "published_shape", False):
            raise
        raise OutOfReach(error.message) from error
    return build.encode_rows(recipe, splits, tokenizer, model), tokenizer


def _read(recipe: Recipe, splits: Splits | None, model: PreTrainedModel) -> Reading:
    rows, tokenizer = encode_within_reach(recipe, splits, model)
    first = rows.encoded.rows[0]
    return Reading(
        steps=total_steps(build.make_settings(recipe), rows.data.batches),
        rows=len(rows.encoded.rows),
        watched=len(rows.splits.validation),
        scored=sum(map(len, rows.splits.tests.values())),
        truncated=rows.encoded.truncated,
        answers_cut_off=rows.encoded.answers_cut_off,
        dropped=rows.splits.dropped,
        padding_share=rows.data.padding_share,
        positions=rows.data.positions,
        pieces=split_row(first, tokenizer, rows.kind.loss == "causal"),
        label=rows.kind.shown_label(first),
        notes=rows.notes,
        taken=rows.splits.taken,
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
