"""Which rows a run trains on, watches and is scored by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from moc_cli.data import glue
from moc_cli.data.batches import Batches, Side, collate
from moc_cli.data.encode import Encoded
from moc_cli.data.examples import Example, fingerprint, hold_out, subset
from moc_cli.data.prompts import template_hash
from moc_cli.data.suites import load_examples, scored_splits
from moc_cli.errors import DataError
from moc_cli.training.contracts import Data
from moc_cli.training.loss import Kind

# Which rows are held out or drawn does not follow the recipe's seed: runs that differ in their seed
# are compared on the same rows.
DRAW = 0


@dataclass(frozen=True)
class Rows:
    """Examples before any tokenizer: to train on, to watch during training, to score by task."""

    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Return the number and hash of each part, and the hash of the prompts' template."""
        parts = {"train": self.train, "validation": self.validation}
        parts |= {f"test {name}": examples for name, examples in self.tests.items()}
        return {
            name: {"rows": len(examples), "sha256": fingerprint(examples)}
            for name, examples in parts.items()
        } | {"template": {"sha256": template_hash()}}


def read_rows(
    suite: str,
    tasks: Sequence[str],
    *,
    path: str | None = None,
    held_out: int = 0,
    max_train: int | None = None,
    max_validation: int | None = None,
    max_test: int | None = None,
) -> Rows:
    """Read every part of the tasks; limits on validation and test rows count by task.

    Commonsense tasks hold `held_out` of their joint training rows out as validation; GLUE tasks
    are watched and scored on their validation split; the built-in one has three parts.
    """
    train = [row for task in tasks for row in _load(suite, task, "train", path)]
    validation: list[Any] = []
    if suite != "commonsense":
        for task in tasks:
            validation += subset(_load(suite, task, "validation", path), max_validation, seed=DRAW)
    elif held_out:
        train, validation = hold_out(train, held_out, seed=DRAW)
        by_task = ([row for row in validation if row.task == task] for task in tasks)
        limited = (subset(rows, max_validation, seed=DRAW) for rows in by_task)
        validation = [row for rows in limited for row in rows]
    tests = {}
    for task in tasks:
        splits = scored_splits(suite, task)
        for split in splits:
            # MNLI has two; elsewhere the task's name alone says what was scored.
            name = task if split == splits[0] else f"{task} ({split.removeprefix('validation_')})"
            tests[name] = subset(_load(suite, task, split, path), max_test, seed=DRAW)
    return Rows(subset(train, max_train, seed=DRAW), validation, tests)


def _load(suite: Any, task: str, split: str, path: str | None) -> list[Any]:
    """Load examples of whichever kind the suite has."""
    return list(load_examples(suite, task, split, path=path))


def task_kind(suite: str, task: str) -> Kind:
    """Return what kind of loss a task is trained with."""
    if suite != "glue":
        return "causal"
    return "regression" if glue.TASKS[task].regression else "classification"


def model_arguments(suite: str, task: str) -> dict[str, Any]:
    """Return what a model has to be loaded as for a task: kind, labels, type of problem."""
    kind = task_kind(suite, task)
    if kind == "causal":
        return {"kind": "causal"}
    problem = "regression" if kind == "regression" else "single_label_classification"
    labels = glue.TASKS[task].num_labels
    return {"kind": "classification", "num_labels": labels, "problem_type": problem}


def training_data(
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Kind,
    batch_size: int,
    seed: int,
    group_by_length: bool,
) -> Data:
    """Return encoded rows as the loop wants them.

    Raises DataError when no row has a target.
    """
    if kind == "causal" and encoded.answerless == len(encoded.rows):
        raise DataError(
            "data.max_length cuts off the answer of every training row", "raise data.max_length"
        )
    batches = Batches(encoded.lengths, batch_size, seed=seed, group_by_length=group_by_length)
    side: Side = "left" if kind == "causal" else "right"
    shape = "causal" if kind == "causal" else "classification"

    def take(numbers: list[int]) -> dict[str, Any]:
        rows = [encoded.rows[number] for number in numbers]
        return collate(rows, tokenizer, side=side, kind=shape)  # type: ignore[arg-type]

    return Data(batches, take, kind, batches.padding_share())
