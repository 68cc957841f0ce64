"""Which rows a run trains on, is watched by and is scored on, before any tokenizer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moc_cli.data.custom.chat import read_template
from moc_cli.data.custom.frame import frame_hash, read_frame
from moc_cli.data.custom.rows import read_custom
from moc_cli.data.custom.rows import read_scored as read_custom_scored
from moc_cli.data.examples import Example, fingerprint, hold_out, subset
from moc_cli.data.prompts import template_hash
from moc_cli.data.suites import check_task, load_examples, scored_names
from moc_cli.errors import DataError
from moc_cli.recipe.names import ColumnsSection
from moc_cli.recipe.sections import DataSection


@dataclass(frozen=True)
class Splits:
    """Examples to train on, to watch during training, and to score by task.

    Of a custom dataset also: which rows are scored (`test`, `validation`, `held_out` or `none`),
    how many rows had nothing to learn, by part and reason, and what the rows were taken for.
    """

    train: list[Example]
    validation: list[Example]
    tests: dict[str, list[Example]]
    template: str = field(default_factory=template_hash)
    scored: str | None = None
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    taken: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What results.json says of the rows."""
        if self.scored is None:
            return {"dropped": self.dropped} if self.dropped else {}
        return {"scored_split": self.scored, "dropped": self.dropped}

    @property
    def all_examples(self) -> list[Example]:
        """The examples of every part."""
        parts = [self.train, self.validation, *self.tests.values()]
        return [example for part in parts for example in part]

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Return the number and hash of each part, and the hash of the prompts' template."""
        parts = {"train": self.train, "validation": self.validation}
        parts |= {f"test {name}": examples for name, examples in self.tests.items()}
        return {
            name: {"rows": len(examples), "sha256": fingerprint(examples)}
            for name, examples in parts.items()
        } | {"template": {"sha256": self.template}}


@dataclass(frozen=True)
class TaskRows:
    """Rows of one task to score: `rows` are their numbers in the `split`, from 0.

    `notes` say what was decided on reading.
    """

    name: str
    split: Sequence[Example]
    rows: list[int]
    notes: Sequence[str] = ()

    @classmethod
    def draw(
        cls, name: str, examples: Sequence[Example], limit: int | None, notes: Sequence[str] = ()
    ) -> "TaskRows":
        """Take all the rows of a split, or `limit` of them, the same ones in every run."""
        rows = subset(list(range(len(examples))), limit)
        return cls(name, examples, rows, notes)

    @property
    def examples(self) -> list[Example]:
        """The rows themselves."""
        return [self.split[row] for row in self.rows]

    @property
    def total(self) -> int:
        """The size of the split."""
        return len(self.split)

    @property
    def limited(self) -> bool:
        """Whether rows are left out."""
        return len(self.rows) < self.total

    @property
    def fingerprint(self) -> str:
        """Names the rows that are scored: two scores with the same one are of the same rows."""
        return fingerprint(self.examples)


def read_scored(
    data: DataSection,
    tasks: Sequence[str],
    *,
    path: str | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[TaskRows]:
    """Read the rows on which tasks are scored, `limit` of each; of another `split` if it is named.

    `path` takes the place of the section's. Raises DataError for an unknown task or split and for
    rows that cannot be used.
    """
    if data.custom:
        other_tasks = [name for name in tasks if name not in data.tasks]
        if other_tasks or split:
            absent = f"task '{other_tasks[0]}'" if other_tasks else f"split '{split}'"
            raise DataError(
                f"the run was trained on a custom dataset, which has no {absent}",
                f"leave it out; its task is {data.tasks[0]}",
            )
        examples, notes = read_custom_scored(data, path)
        return [TaskRows.draw(data.tasks[0], examples, limit, notes)]
    for name in tasks:
        check_task(data.suite, name)
    scored = []
    for name in tasks:
        for shown, part in ({name: split} if split else scored_names(data.suite, name)).items():
            examples = load_examples(data.suite, name, part, path=path or data.path)
            scored.append(TaskRows.draw(shown, examples, limit))
    return scored


def read_splits(
    data: DataSection, *, max_test: int | None = None, watched: bool = True
) -> tuple[DataSection, Splits]:
    """Read every part of the tasks; return `data` with all that the rows tell, and the rows.

    A custom dataset tells its format, its columns and its labels where the section does not.
    Raises DataError naming every bad row.
    """
    if not data.custom:
        return data, _read_benchmark(data, max_test)
    custom = read_custom(data, watched=watched)
    written = written_out(data)
    test = subset(custom.test, max_test)
    splits = Splits(
        subset(custom.train, data.max_train_samples),
        subset(custom.validation, data.max_eval_samples),
        {data.tasks[0]: test} if test else {},
        frame_hash(written.template),
        custom.scored,
        custom.dropped,
        custom.taken,
    )
    update: dict[str, Any] = {"format": custom.format, "labels": custom.labels}
    column_of = custom.columns.column_of
    named = {key: column_of[key] for key in ColumnsSection.model_fields if key in column_of}
    update["columns"] = data.columns.model_copy(update=named)
    return written.model_copy(update=update), splits


def written_out(data: DataSection) -> DataSection:
    """Return the section of a custom dataset with the texts of its templates, as a run keeps it.

    Raises DataError for a template that cannot be read.
    """
    update = {"template": read_frame(data.template)}
    if data.chat_template is not None:
        update["chat_template"] = read_template(data.chat_template)
    return data.model_copy(update=update)


def _read_benchmark(data: DataSection, max_test: int | None) -> Splits:
    """Read a benchmark; limits on validation and test rows count by task.

    A suite without a validation split holds `held_out` of its tasks' joint training rows out; GLUE
    tasks are watched and scored on their validation split, unless `eval_split` is held_out.
    """

    def load(task: str, split: str) -> list[Example]:
        return load_examples(data.suite, task, split, path=data.path)

    train = [row for task in data.tasks for row in load(task, "train")]
    validation: list[Example] = []
    if not data.holds_out:
        for task in data.tasks:
            validation += subset(load(task, "validation"), data.max_eval_samples)
    elif data.held_out:
        train, held_out = hold_out(train, data.held_out)
        for task in data.tasks:
            rows = [row for row in held_out if row.task == task]
            validation += subset(rows, data.max_eval_samples)
    tests = {
        shown: subset(load(task, split), max_test)
        for task in data.tasks
        for shown, split in scored_names(data.suite, task).items()
    }
    return Splits(subset(train, data.max_train_samples), validation, tests)
