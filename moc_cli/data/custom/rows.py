"""A person's own rows: from a path to examples to train on, to watch and to score."""

from collections import Counter
from dataclasses import dataclass, field

from moc_cli.data.custom.bad_rows import Complaints
from moc_cli.data.custom.build import Build, Label, NothingToLearn, builder, class_label
from moc_cli.data.custom.columns import find_columns, is_whole
from moc_cli.data.custom.tables import Table, read_tables
from moc_cli.data.examples import Example, hold_out
from moc_cli.data.source import BadRow
from moc_cli.errors import DataError
from moc_cli.recipe.schema import DataSection, Format

# Which rows are held out does not follow the recipe's seed: runs that differ in it are compared on
# the same rows.
DRAW = 0


@dataclass(frozen=True)
class CustomRows:
    """Examples of one's own, and what was found out about them.

    `scored` says which rows `test` are: `test`, `validation` or `held_out`. `dropped` counts, by
    part, the rows that had nothing to learn, by reason.
    """

    format: Format
    labels: list[Label] | None
    train: list[Example]
    validation: list[Example]
    test: list[Example]
    scored: str
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)


def read_custom(data: DataSection) -> CustomRows:
    """Read the rows that `data` names and cut the held-out ones from train, if need be.

    Scored are the test file's rows, else the validation file's, else those held out. Raises
    DataError naming every bad row of every part, and where nothing is left to train on or to score.
    """
    assert data.path is not None, "the recipe's rules ask for it"
    tables = read_tables(data.path)
    kind, columns = find_columns(data, tables["train"])
    complaints = Complaints()
    labels, told = None, {}
    if kind == "classification":
        told = {} if data.labels else _labels(tables["train"], columns["label"])
        labels = data.labels or list(told)
    build = builder(kind, columns, data.tasks[0], labels)
    parts, dropped = {}, {}
    for split, table in tables.items():
        parts[split], dropped[split] = _gather(table, build, complaints)
    complaints.tell()
    if told:
        _check_labels(tables["train"], columns["label"], told)
    train, validation = parts["train"], parts.get("validation", [])
    if "validation" not in parts and data.held_out:
        whole = len(train)
        train, validation = hold_out(train, data.held_out, seed=DRAW)
        copies = whole - len(train) - len(validation)
        if copies:
            dropped["train"]["a held-out row's copy"] = copies
    test = parts.get("test", validation)
    if not test:
        raise DataError(
            f"{data.path} has rows to train on, but none to score",
            "give a validation or test file beside train, or data.held_out above 0",
        )
    scored = "test" if "test" in parts else "validation" if "validation" in parts else "held_out"
    dropped = {split: reasons for split, reasons in dropped.items() if reasons}
    return CustomRows(kind, labels, train, validation, test, scored, dropped)


def read_scored(data: DataSection, path: str | None = None) -> list[Example]:
    """Return the examples that a run is scored on, or all of another file.

    `data` is a run's own section, in which format and labels are known. Of another folder the test
    rows are taken, else the validation rows.
    """
    if path is None or path == data.path:
        return read_custom(data).test
    tables = read_tables(path)
    split = next((split for split in ("test", "validation") if split in tables), "train")
    table = tables[split]
    kind, columns = find_columns(data, table)
    complaints = Complaints()
    found, _ = _gather(table, builder(kind, columns, data.tasks[0], data.labels), complaints)
    complaints.tell()
    return found


def _gather(
    table: Table, build: Build, complaints: Complaints
) -> tuple[list[Example], dict[str, int]]:
    """Build the rows of a table; note the bad ones, and count those with nothing to learn."""
    built: list[Example] = []
    dropped: Counter[str] = Counter({"a blank line": table.blank} if table.blank else {})
    for number, fields in table.rows:
        place = (table.name, table.unit, number)
        try:
            if isinstance(fields, BadRow):
                raise fields
            built.append(build(fields, place))
        except BadRow as error:
            complaints.add(place, str(error))
        except NothingToLearn as reason:
            dropped[str(reason)] += 1
    if not built and not complaints:
        raise DataError(f"{table.name}: no row has anything to learn ({counted(dropped)})")
    return built, dict(dropped)


def counted(reasons: dict[str, int]) -> str:
    """Return reasons with their counts: `3 rows with an empty text, 1 with a blank line`."""
    return ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items())


def _labels(train: Table, column: str) -> dict[Label, int]:
    """Return the classes of the training rows and the first row of each, sorted where that is
    possible; in a CSV, whole numbers as such.
    """
    found: dict[Label, int] = {}
    for number, fields in train.rows:
        if isinstance(fields, dict):
            try:
                found.setdefault(class_label(fields, column), number)
            except BadRow:
                continue  # told when the row is built
    if not train.typed and all(map(is_whole, found)):
        found = {int(label): number for label, number in found.items()}
    kinds = {type(label) for label in found}
    return found if len(kinds) > 1 else dict(sorted(found.items()))


def _check_labels(train: Table, column: str, found: dict[Label, int]) -> None:
    """Raise DataError where labels are texts and numbers, or all the same."""
    kinds = {type(label): (label, number) for label, number in found.items()}
    if len(kinds) > 1:
        told = [f"{label!r} ({train.unit} {number})" for label, number in kinds.values()]
        raise DataError(
            f"{train.name}: '{column}' holds texts and whole numbers: {' and '.join(told)}"
        )
    if len(found) == 1:
        (only,) = found
        raise DataError(
            f"{train.name}: '{column}' is {only!r} in every row; two classes are needed"
        )
