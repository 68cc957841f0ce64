"""A custom dataset: from a path to the examples that are trained on, watched and scored."""

from collections import Counter
from dataclasses import dataclass, field

from moc_cli.data.custom.build import BuildExample, Label, NothingToLearn, example_builder
from moc_cli.data.custom.columns import check_labels, find_columns, find_labels
from moc_cli.data.custom.parts import read_other, read_parts
from moc_cli.data.custom.table import Table
from moc_cli.data.examples import ROW_SEED, Example, hold_out
from moc_cli.data.source import BadRow, BadRows
from moc_cli.errors import DataError
from moc_cli.recipe.sections import DataSection, Format


@dataclass(frozen=True)
class CustomRows:
    """The examples of a custom dataset, with its format and classes.

    `scored` says which rows `test` are: `test`, `validation` or `held_out`. `dropped` counts, by
    split, the rows that had nothing to learn, by reason.
    """

    format: Format
    labels: list[Label] | None
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    scored: str
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)


def read_custom(data: DataSection) -> CustomRows:
    """Read the rows that `data` names; hold some out of train where there is no validation file.

    The test file is scored, else the validation file, else the rows held out. Raises DataError
    naming every bad row of every split, and where nothing is left to train on or to score.
    """
    tables = read_parts(data)
    format_name, columns = find_columns(data, tables["train"])
    labels, first_rows = None, {}
    if format_name == "classification":
        first_rows = {} if data.labels else find_labels(tables["train"], columns["label"])
        labels = data.labels or list(first_rows)
    build = example_builder(format_name, columns, data.tasks[0], labels)
    bad_rows = BadRows()
    splits, dropped = {}, {}
    for split, table in tables.items():
        splits[split], dropped[split] = _build_examples(table, build, bad_rows)
    bad_rows.raise_if_any()
    if first_rows:
        check_labels(tables["train"], columns["label"], first_rows)

    train, validation = splits["train"], splits.get("validation", [])
    if "validation" not in splits and data.held_out:
        count = len(train)
        train, validation = hold_out(train, data.held_out, seed=ROW_SEED)
        if copies := count - len(train) - len(validation):
            dropped["train"]["a held-out row's copy"] = copies
    test = splits.get("test", validation)
    if not test:
        raise DataError(
            f"{tables['train'].name} has rows to train on, but none to score",
            "give a validation or test file beside train, or data.held_out above 0",
        )
    scored = next((split for split in ("test", "validation") if split in splits), "held_out")
    dropped = {split: reasons for split, reasons in dropped.items() if reasons}
    return CustomRows(format_name, labels, train, validation, test, scored, dropped)


def read_scored(data: DataSection, path: str | None = None) -> list[Example]:
    """Return the examples that a run is scored on, or those of another path.

    `data` is the section of a run, which has its format and labels. Of another folder the test rows
    are taken, else the validation rows.
    """
    if path is None or path == data.path:
        return read_custom(data).test
    tables = read_other(path, data)
    table = tables.get("test") or tables.get("validation") or tables["train"]
    format_name, columns = find_columns(data, table)
    bad_rows = BadRows()
    build = example_builder(format_name, columns, data.tasks[0], data.labels)
    examples, _ = _build_examples(table, build, bad_rows)
    bad_rows.raise_if_any()
    return examples


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
