"""`moc train --dry-run`: all checks but loading weights, and one row as the loss will see it."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.data.encode import IGNORED, Row
from moc_cli.data.splits import Splits
from moc_cli.errors import DataError, MocError
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.tasks import is_packaged
from moc_cli.training import build
from moc_cli.training.device_checks import check_device_keys, find_device, gpu_problem
from moc_cli.training.log import require_trackers
from moc_cli.training.loop_types import total_steps


def preview(recipe: Recipe, processes: int = 1) -> dict[str, Any]:
    """Place the method in the model's shapes, then read the rows and the tokenizer.

    Returns plain values; `share` is a fraction of the base, `published_shape`: the shapes counted
    are those that this package ships. `unread` says why rows were not read, None where they were.
    `steps` are those of a run in so many `processes`.
    Raises MocError for all that would stop the run before its weights are read, but for what is
    only reported: a GPU that this machine lacks, and rows or a tokenizer of the hub that cannot be
    had at present.
    """
    require_trackers(recipe.output.report_to)
    missing = gpu_problem(recipe.launch.device)
    notes = [f"{missing}: on this machine the run is refused"] if missing else []
    check_device_keys(recipe, find_device(recipe.launch.device), training=True)
    splits = None
    if recipe.data.custom:  # its rows say what the model has to be
        recipe, splits = build.read_rows(recipe)
    adapted = build.build_shapes(recipe)
    counts, model = adapted.counts(), adapted.model
    content: dict[str, Any] = {
        "trainable": counts.trainable,
        **counts.to_json(),
        "published_shape": bool(getattr(model, "published_shape", False)),
        "processes": processes,
    }
    try:
        read = _read(recipe, splits, model, processes)
    except OutOfReach as away:
        return content | {"unread": str(away), "notes": notes}
    return content | {"unread": None} | read | {"notes": notes + read["notes"]}


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
        if data.path is not None or is_packaged(data.suite):
            raise
        raise OutOfReach(error.message) from error
    try:
        tokenizer = build.make_tokenizer(recipe.model, recipe.data.chat_template)
    except MocError as error:
        if not getattr(model, "published_shape", False):
            raise
        raise OutOfReach(error.message) from error
    return build.encode_rows(recipe, splits, tokenizer, model), tokenizer


def _read(
    recipe: Recipe, splits: Splits | None, model: PreTrainedModel, processes: int
) -> dict[str, Any]:
    """Return what the rows come to, and the first of them; `label` is a classifier's."""
    rows, tokenizer = encode_within_reach(recipe, splits, model)
    encoded, splits, first = rows.encoded, rows.splits, rows.encoded.rows[0]
    pieces = split_row(first, tokenizer)
    settings = replace(build.make_settings(recipe), processes=processes)
    return {
        "steps": total_steps(settings, rows.data.batches),
        "rows": len(encoded.rows),
        "watched": len(splits.validation),
        "scored": sum(map(len, splits.tests.values())),
        "truncated": encoded.truncated,
        "answers_cut_off": encoded.answers_cut_off,
        "dropped": splits.dropped,
        "padding_share": rows.data.padding_share,
        "positions": dict(zip(("padded", "packed"), rows.data.positions, strict=True)),
        "notes": rows.notes,
        "taken": splits.taken,
        "row": {"pieces": pieces, "label": rows.kind.shown_label(first)},
    }


def split_row(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Decode a row in pieces: neighbouring tokens that all are targets of the loss, or none.

    The first token of a language model's row is never a target: nothing comes before it. None of
    a classifier's tokens is one.
    """
    ids: Sequence[int] = row["input_ids"]
    targets = [False] * len(ids)
    if isinstance(row["labels"], list):
        targets[1:] = [label != IGNORED for label in row["labels"][1:]]
    pieces = []
    for target, group in groupby(zip(ids, targets, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in group]
        text = str(tokenizer.decode(tokens))
        pieces.append({"text": text, "tokens": len(tokens), "target": target})
    return pieces
