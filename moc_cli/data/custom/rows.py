"""A custom dataset: from a path to the examples that are trained on, watched and scored."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moc_cli.data.custom.build import BuildExample, example_builder
from moc_cli.data.custom.columns import Columns, columns_note, find_columns, label_question
from moc_cli.data.custom.frame import NAMES
from moc_cli.data.custom.labels import Classes, Label, check_labels, find_labels, has_answers
from moc_cli.data.custom.messages import NothingToLearn, split_chats
from moc_cli.data.custom.parts import read_other, read_parts
from moc_cli.data.custom.prepare import join_turns, name_classes
from moc_cli.data.custom.table import Table
from moc_cli.data.examples import ChatExample, Example, hold_out
from moc_cli.data.source import BadRow, BadRows
from moc_cli.errors import DataError
from moc_cli.recipe.names import PARTS
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.tasks import Format


@dataclass(frozen=True)
class CustomRows:
    """The examples of a custom dataset, with its format and classes.

    `scored` says which rows `test` are: `test`, `validation`, `held_out`, or `none`. `dropped`
    counts, by split, the rows that had nothing to learn, by reason. `notes` say what was decided
    on reading.
    """

    columns: Columns
    labels: list[Label] | None
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    scored: str
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def format(self) -> Format:
        """The format of the rows."""
        return self.columns.format

    @property
    def taken(self) -> dict[str, Any]:
        """What the rows were taken for, as plain values."""
        return asdict(self.columns) | {"labels": self.labels, "notes": self.notes}


def read_custom(data: DataSection, *, watched: bool = True) -> CustomRows:
    """Read the rows that `data` names; hold some out of train where there is no validation file.

    The test file is scored, else the validation file, else the rows held out; a part none of whose
    rows has an answer is left out. Rows are held out where they are scored or `watched`. Raises
    DataError naming every bad row of every split, and where nothing is left to train on.
    """
    tables = read_parts(data)
    notes = [note for table in tables.values() for note in table.notes]
    notes += join_turns(tables, data)
    columns = find_columns(data, tables["train"])
    notes += label_question(columns, tables["train"])
    labels, first_rows = None, {}
    if label := columns.classes:
        for table in tables.values():
            name_classes(table, label, data.labels)
        first_rows = {} if data.labels else find_labels(tables["train"], label)
        labels = data.labels or [*tables["train"].classes.get(label, [])] or list(first_rows)
    notes += _leave_out_hidden(tables, columns, Classes(labels or []))
    if columns.framed:
        name = data.template if data.template in NAMES else "the recipe's own template"
        notes.append(f"prompts are written by {name} (data.template)")
    build = example_builder(data, columns, labels)
    bad_rows = BadRows()
    splits, dropped = {}, {}
    for split, table in tables.items():
        splits[split], dropped[split] = _build_examples(table, build, bad_rows)
    bad_rows.raise_if_any()
    if first_rows:
        check_labels(tables["train"], columns.column_of["label"], first_rows)

    train, validation = splits["train"], splits.get("validation", [])
    if "validation" not in splits and data.held_out and (watched or "test" not in splits):
        rows = len(train)
        train, validation = hold_out(train, data.held_out)
        if copies := rows - len(train) - len(validation):
            dropped["train"]["a held-out row's copy"] = copies
    test = splits.get("test", validation)
    scored = next((split for split in ("test", "validation") if split in splits), "held_out")
    if not test:
        scored = "none"
        notes.append("no rows are scored: there is no test or validation part, held_out is 0")
    dropped = {split: reasons for split, reasons in dropped.items() if reasons}
    train, validation, test = (_turns(part, data) for part in (train, validation, test))
    return CustomRows(columns, labels, train, validation, test, scored, dropped, notes)


def _turns(examples: list[Any], data: DataSection) -> list[Any]:
    """Cut conversations as `data.chat_turns` says, after whole ones were held out."""
    chats = bool(examples) and isinstance(examples[0], ChatExample)
    return split_chats(examples, data.chat_turns) if chats else examples


def _leave_out_hidden(tables: dict[str, Table], columns: Columns, classes: Classes) -> list[str]:
    """Remove the parts none of whose rows has its label or output, and say so."""
    notes = []
    for part in ("validation", "test"):
        if part in tables and (reason := _no_answers(tables[part], columns, classes)):
            del tables[part]
            notes.append(reason)
    return notes


def _no_answers(table: Table, columns: Columns, classes: Classes) -> str | None:
    """Return that none of the rows has its label or output; None where one has."""
    answer = columns.column_of.get("label", columns.column_of.get("output"))
    if answer is None or has_answers(table, answer, classes):
        return None
    return f"{table.name} is left out: none of its {len(table.rows)} rows has {answer!r}"


def read_scored(data: DataSection, path: str | None = None) -> tuple[list[Example], Sequence[str]]:
    """Return the examples that a run is scored on, or those of another path, and notes on reading.

    `data` is the section of a run, which has its format, columns and labels. Of another folder the
    test rows are taken, else the validation rows, else the training rows; a part none of whose rows
    has an answer is left out.
    """
    if path is None or same_place(path, data.path):
        scored = read_custom(data).test
        if not scored:
            raise DataError("the run has no rows to score", "name a file of rows: --path FILE")
        return scored, []
    tables = read_other(path, data)
    hidden: list[str] = []
    for part in filter(tables.__contains__, reversed(PARTS)):
        table = tables[part]
        notes = table.notes + join_turns({part: table}, data)
        columns = find_columns(data, table, of_run=True)
        if columns.classes:
            name_classes(table, columns.classes, data.labels)
        reason = _no_answers(table, columns, Classes(data.labels or []))
        if reason is None:
            break
        hidden.append(reason)
    else:
        hint = "moc predict classifies rows without labels" if data.task.kind.classifier else None
        raise DataError("\n".join([*hidden, "no rows are left to score"]), hint)
    bad_rows = BadRows()
    build = example_builder(data, columns, data.labels)
    examples, dropped = _build_examples(table, build, bad_rows)
    bad_rows.raise_if_any()
    notes = hidden + notes + columns_note(data, columns.column_of, table)
    if dropped:
        notes.append(f"{table.name}: left out, and not numbered: {counted(dropped)}")
    return _turns(examples, data), notes


def same_place(path: str, other_path: str | None) -> bool:
    """Return whether two paths name one file or folder, however they are written."""
    places = [Path(name).expanduser() for name in (path, other_path) if name is not None]
    both_exist = len(places) == 2 and all(place.exists() for place in places)
    return path == other_path or (both_exist and places[0].samefile(places[1]))


def _build_examples(
    table: Table, build: BuildExample, bad_rows: BadRows
) -> tuple[list[Example], dict[str, int]]:
    """Build the rows of a table; note the bad ones, and count those with nothing to learn."""
    examples: list[Example] = []
    dropped: Counter[str] = Counter({"a blank line": table.blank} if table.blank else {})
    for place, row in table.rows:
        try:
            if isinstance(row, BadRow):
                raise row
            examples.append(build(row, place))
        except BadRow as error:
            bad_rows.add(place, error)
        except NothingToLearn as reason:
            dropped[str(reason)] += 1
    if not examples and not bad_rows:
        raise DataError(f"{table.name}: no row has anything to learn ({counted(dropped)})")
    return examples, dict(dropped)


def counted(reasons: dict[str, int]) -> str:
    """Return reasons with their counts: `3 with an empty text, 1 with a blank line`."""
    return ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items())
