"""Which columns hold what, and so what kind of rows they are."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from moc_cli.data.custom.tables import Table
from moc_cli.data.source import did_you_mean
from moc_cli.errors import DataError
from moc_cli.recipe.schema import DataSection, Format
from moc_cli.recipe.suggest import nearest
from moc_cli.recipe.tasks import FORMATS

USUAL = {
    "text": ("text", "sentence", "sentence1"),
    "text_pair": ("text_pair", "sentence2"),
    "label": ("label", "labels", "score"),
    "instruction": ("instruction", "prompt"),
    "input": ("input",),
    "output": ("output", "response", "completion"),
    "messages": ("messages", "conversation"),
}
OPTIONAL = ("text_pair", "input")
MANY = 50  # whole numbers as labels: more different ones may well be meant as amounts
_FORMATS = (
    "formats by their columns: chat (messages), instruction (instruction, input, output), "
    "classification or regression (text, text_pair, label), text (text); columns of other names "
    "are given in data.columns, such as --set data.columns.text=NAME"
)
_WHOLE = re.compile(r"[-+]?\d+")


def find_columns(data: DataSection, train: Table) -> tuple[Format, dict[str, str]]:
    """Return the format of the rows, asked for or told by their columns, and the name of each
    column that it reads.

    Raises DataError, with the nearest name, where a column is absent.
    """
    there = train.columns
    named = {key: name for key, name in data.columns if name is not None}
    absent = [
        f"data.columns.{key}: {train.name} has no column {name!r}{did_you_mean(name, there)}"
        for key, name in named.items()
        if name not in there
    ]
    if absent:
        raise DataError("\n".join(absent), f"its columns: {', '.join(there)}")
    usual = {key: next((n for n in names if n in there), None) for key, names in USUAL.items()}
    found = {key: name for key, name in (usual | named).items() if name is not None}
    kind = data.format or _guess(found, data, train)
    used = FORMATS[kind].columns
    missing = [key for key in used if key not in found and key not in OPTIONAL]
    if missing:
        told = "; ".join(_missing(key, there) for key in missing)
        raise DataError(
            f"{train.name}: format '{kind}' needs {told}", f"its columns: {', '.join(there)}"
        )
    return kind, {key: found[key] for key in used if key in found}


def is_number(value: Any) -> bool:
    """Whether a label is a number that is finite, or a text that reads as one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def is_whole(value: Any) -> bool:
    """Whether a label is a whole number, or a text that is written as one."""
    if isinstance(value, str):
        return _WHOLE.fullmatch(value.strip()) is not None
    return is_number(value) and float(value).is_integer()


def _guess(found: Mapping[str, str], data: DataSection, train: Table) -> Format:
    if "messages" in found:
        return "chat"
    if "instruction" in found and "output" in found:
        return "instruction"
    if "text" not in found:
        there = train.columns
        half = {"output": "instruction", "instruction": "output"}  # one half asks for the other
        sought = [half[key] for key in half if key in found] or ["text", "messages"]
        near = next((w for w in (_near(key, there) for key in sought) if w), "")
        columns = ", ".join(map(repr, there)) or "none"
        raise DataError(f"{train.name}: its columns ({columns}) fit no format{near}", _FORMATS)
    if "label" in found:
        return "classification" if data.labels else _by_labels(found["label"], train)
    return "text"


def _by_labels(column: str, train: Table) -> Format:
    readable = (fields for _, fields in train.rows if isinstance(fields, dict))
    labels = [fields.get(column) for fields in readable]
    if train.typed:
        numbers = [isinstance(label, int | float) and is_number(label) for label in labels]
    else:
        numbers = [is_number(label) for label in labels]
    if not all(numbers):
        return "classification"
    if not all(map(is_whole, labels)):
        return "regression"
    different = len(set(labels))
    if different > MANY:
        raise DataError(
            f"{train.name}: column {column!r} holds {different} different whole numbers, which may "
            "be classes or amounts",
            "--set data.format=classification or --set data.format=regression",
        )
    return "classification"


def _missing(key: str, there: Sequence[str]) -> str:
    return f"a column {' or '.join(map(repr, USUAL[key]))}{_near(key, there)}"


def _near(key: str, there: Sequence[str]) -> str:
    """Return a question about the column that is most like one of the usual names."""
    near = next((word for word in (nearest(name, there) for name in USUAL[key]) if word), None)
    return f" (is it {near!r}? then data.columns.{key}={near})" if near else ""
