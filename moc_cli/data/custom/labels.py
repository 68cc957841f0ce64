"""The labels of a custom dataset: classes, numbers and missing ones; the classes of its rows."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moc_cli.data.custom.table import Table
from moc_cli.data.examples import Place
from moc_cli.data.source import BadRow, Fields, check_utf8, column_of_row, shown
from moc_cli.errors import DataError
from moc_cli.recipe.suggest import did_you_mean

Label = int | str
HIDDEN = -1  # what the hub writes for labels that are not published
_MISSING = {"", "nan", "na", "n/a", "null", "none", "<na>"}  # as data frames write it in a CSV
_WHOLE = re.compile(r"[-+]?\d{1,18}(\.0*)?")
_CANONICAL = re.compile(r"(-?(?:0|[1-9]\d{0,17}))(\.0+)?")  # "01" is a name, not a number


def is_number(value: Any) -> bool:
    """Return whether a label is a finite number, or a text that reads as one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def is_whole(value: Any) -> bool:
    """Return whether a label is a whole number, or a text that is written as one: 1 or 1.0."""
    if isinstance(value, str):
        return _WHOLE.fullmatch(value.strip()) is not None
    return is_number(value) and float(value).is_integer()


def is_missing(value: Any) -> bool:
    """Return whether a value stands for no label: null, NaN, or a word for it among numbers."""
    return value is None or value != value or _is_missing_word(value)


def number_label(fields: Fields, column: str) -> float:
    """Return the score of a row; raises BadRow."""
    value = _label(fields, column)
    if _is_missing_word(value):
        raise BadRow(f"'{column}' is {shown(value)}, a missing value: a row needs its label")
    if not is_number(value):
        raise BadRow(f"'{column}' is {shown(value)}, not a number")
    return float(value)


def class_label(fields: Fields, column: str) -> Label:
    """Return the class of a row, without surrounding blanks; raises BadRow.

    Booleans are the classes `false` and `true`.
    """
    value = _label(fields, column)
    if isinstance(value, str):
        return check_utf8(value, column).strip()
    if isinstance(value, bool):
        return str(value).lower()
    if is_whole(value):
        return int(value)
    if is_number(value):
        raise BadRow(f"'{column}' is {value}, not a class; data.format: regression learns numbers")
    raise BadRow(f"'{column}' is {shown(value)}, not a class (a text or a whole number)")


class Classes:
    """The classes of a dataset, and the number of each."""

    def __init__(self, labels: Sequence[Label]) -> None:
        self.names = [str(label) for label in labels]
        self._numeric = all(isinstance(label, int) for label in labels)
        # CSV has no numbers and writes booleans in its own way: a class has its text's number too.
        self._numbers: dict[Label, int] = {}
        for number, label in enumerate(labels):
            text = str(label)
            spellings = {text, text.capitalize()} if text in ("true", "false") else {text}
            self._numbers |= dict.fromkeys(spellings, number)
        self._numbers |= {label: number for number, label in enumerate(labels)}

    def number(self, fields: Fields, column: str) -> int:
        """Return the number of a row's class; raises BadRow."""
        label = class_label(fields, column)
        if label in self._numbers:
            return self._numbers[label]
        if isinstance(label, str) and self._numeric:
            number_match = _CANONICAL.fullmatch(label)
            if number_match and int(number_match.group(1)) in self._numbers:
                return self._numbers[int(number_match.group(1))]
            if _is_missing_word(label):
                raise BadRow(
                    f"'{column}' is {shown(label)}, a missing value: a row needs its label"
                )
        listed = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
        raise BadRow(
            f"'{column}' is {shown(label)}, which is not one of the labels"
            f"{did_you_mean(str(label), self.names)} (labels: {listed})"
        )

    def __contains__(self, label: Label) -> bool:
        return label in self._numbers


def find_labels(train: Table, column: str) -> dict[Label, Place]:
    """Return the classes of the training rows and the place of the first row of each.

    They are sorted, unless texts and numbers are mixed; whole numbers of a CSV become numbers.
    Raises DataError where texts and booleans are mixed.
    """
    first_rows: dict[Label, Place] = {}
    booleans: dict[bool, tuple[Any, Place]] = {}
    for place, fields in train.readable():
        try:
            first_rows.setdefault(class_label(fields, column), place)
        except BadRow:
            continue  # named when the example is built
        booleans.setdefault(isinstance(fields[column], bool), (fields[column], place))
    if len(booleans) > 1:
        examples = [f"{shown(value)} ({unit} {n})" for value, (_, unit, n) in booleans.values()]
        raise DataError(
            f"{train.name}: '{column}' holds booleans and others: {' and '.join(examples)}"
        )
    if not train.typed:
        number_matches = {
            text: _CANONICAL.fullmatch(str(text))
            for text in first_rows
            if not _is_missing_word(text)
        }
        if number_matches and all(number_matches.values()):
            numbers: dict[Label, Place] = {}
            for text, match in number_matches.items():
                assert match is not None
                numbers.setdefault(int(match.group(1)), first_rows[text])
            first_rows = numbers
    mixed = len({type(label) for label in first_rows}) > 1
    return first_rows if mixed else dict(sorted(first_rows.items()))


def check_labels(train: Table, column: str, first_rows: Mapping[Label, Place]) -> None:
    """Raise DataError where classes are texts and numbers, or there is only one."""
    kinds = {type(label): (label, place) for label, place in first_rows.items()}
    if len(kinds) > 1:
        examples = [f"{label!r} ({unit} {number})" for label, (_, unit, number) in kinds.values()]
        raise DataError(
            f"{train.name}: '{column}' holds both texts and whole numbers: {' and '.join(examples)}"
        )
    if len(first_rows) == 1:
        (sole_label,) = first_rows
        raise DataError(
            f"{train.name}: '{column}' is {sole_label!r} in every row; two classes are needed"
        )


def has_answers(table: Table, column: str, classes: Classes) -> bool:
    """Return whether any row of a part has its label or output: test splits often hide them."""
    hidden = [] if HIDDEN in classes else [HIDDEN, str(HIDDEN), f"{HIDDEN}.0"]
    values = [fields.get(column) for _, fields in table.readable()]
    return not values or not all(is_missing(value) or value in hidden for value in values)


def _is_missing_word(value: Any) -> bool:
    return isinstance(value, str) and value.strip().lower() in _MISSING


def _label(fields: Fields, column: str) -> Any:
    value = column_of_row(fields, column)
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"'{column}' is empty: a row needs its label")
    return value
