"""Which rows a run trains on, watches and is scored by."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from moc_cli.data.batches import Batches, Side, collate
from moc_cli.data.custom.build import template_hash as custom_template_hash
from moc_cli.data.custom.chat import chat_tokens
from moc_cli.data.custom.rows import CustomRows, read_custom
from moc_cli.data.encode import Encoded
from moc_cli.data.examples import ChatExample, Example, fingerprint, hold_out, subset
from moc_cli.data.prompts import template_hash
from moc_cli.data.suites import load_examples, scored_splits
from moc_cli.errors import DataError
from moc_cli.evaluation.custom import votes_of
from moc_cli.recipe.schema import DataSection
from moc_cli.recipe.tasks import TASKS, kind_of
from moc_cli.training.contracts import Data
from moc_cli.training.loss import Kind

# Which rows are held out or drawn does not follow the recipe's seed: runs that differ in their seed
# are compared on the same rows.
DRAW = 0


@dataclass(frozen=True)
class Rows:
    """Examples before any tokenizer: to train on, to watch during training, to score by task.

    Of one's own rows also: which ones are scored (`test`, `validation` or `held_out`), and how
    many had nothing to learn, by part and reason.
    """

    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    template: str = field(default_factory=template_hash)
    scored: str | None = None
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)

    def facts(self, data: DataSection) -> dict[str, Any]:
        """Return what results.json says of one's own rows."""
        if self.scored is None:
            return {}
        return {"scored_split": self.scored, "dropped": self.dropped} | votes_of(data)

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Return the number and hash of each part, and the hash of the prompts' template."""
        parts = {"train": self.train, "validation": self.validation}
        parts |= {f"test {name}": examples for name, examples in self.tests.items()}
        return {
            name: {"rows": len(examples), "sha256": fingerprint(examples)}
            for name, examples in parts.items()
        } | {"template": {"sha256": self.template}}


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


def read_own(data: DataSection, *, max_test: int | None = None) -> tuple[DataSection, Rows]:
    """Read a person's own rows; return `data` with the format and labels that they have, and them.

    Raises DataError naming every bad row.
    """
    found: CustomRows = read_custom(data)
    (task,) = data.tasks
    rows = Rows(
        subset(found.train, data.max_train_samples, seed=DRAW),
        subset(found.validation, data.max_eval_samples, seed=DRAW),
        {task: subset(found.test, max_test, seed=DRAW)},
        custom_template_hash(),
        found.scored,
        found.dropped,
    )
    return data.model_copy(update={"format": found.format, "labels": found.labels}), rows


def task_kind(data: DataSection) -> Kind:
    """Return what kind of loss a task is trained with.

    Raises DataError where one's own rows have to be read first to know it.
    """
    kind = kind_of(data.suite, data.tasks[0], data.format)
    if kind is None:
        raise DataError("data.format is told by the rows, and they are not read yet")
    return kind if kind in ("classification", "regression") else "causal"


def model_arguments(data: DataSection) -> dict[str, Any]:
    """Return what a model has to be loaded as for a task: kind, labels, type of problem."""
    kind = task_kind(data)
    if kind == "causal":
        return {"kind": "causal"}
    if kind == "regression":
        return {"kind": "classification", "num_labels": 1, "problem_type": "regression"}
    if data.suite == "custom":
        if data.labels is None:
            raise DataError("data.labels are told by the rows, and they are not read yet")
        labels = len(data.labels)
    else:
        labels = TASKS[data.suite][data.tasks[0]].num_labels
    problem = "single_label_classification"
    return {"kind": "classification", "num_labels": labels, "problem_type": problem}


def check_chats(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DataError naming every chat, to train on or to score, that the template refuses."""
    parts = [rows.train, rows.validation, *rows.tests.values()]
    chats = {one: None for part in parts for one in part if isinstance(one, ChatExample)}
    if chats:
        chat_tokens(list(chats), tokenizer)


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
