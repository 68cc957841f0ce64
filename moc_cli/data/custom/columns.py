"""The format of a custom dataset and the columns that it reads; rows that mean something else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moc_cli.data.custom.labels import is_missing, is_number, is_whole
from moc_cli.data.custom.table import Table
from moc_cli.errors import DataError
from moc_cli.recipe.names import COLUMNS, OPTIONAL
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.suggest import did_you_mean, nearest
from moc_cli.recipe.tasks import FORMATS, Format

# What means something beside the columns of a format, always under these names.
EXTRA_COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "chat": {"tools": ("tools", "functions"), "system": ("system",)},
    "instruction": {"system": ("system",), "history": ("history",)},
}
BY_COLUMNS = "by its columns"
MANY = 50  # different whole numbers as labels; more of them may well be amounts
_FORMATS = (
    "formats by their columns: chat (messages), instruction (instruction, input, output), "
    "classification or regression (text, text_pair, label), text (text); columns of other names "
    "are given in data.columns, such as --set data.columns.text=NAME"
)


@dataclass(frozen=True)
class Columns:
    """The format of the rows and why, the column of each key that it reads, and those left over."""

    format: Format
    why: str
    column_of: dict[str, str]
    not_read: list[str]

    @property
    def classes(self) -> str | None:
        """The column of the classes; None where nothing is classified."""
        return self.column_of["label"] if self.format == "classification" else None

    @property
    def framed(self) -> bool:
        """Whether `data.template` writes the prompts."""
        return self.format == "instruction"


def names_columns(data: DataSection) -> bool:
    """Return whether the section of a run names the columns that were read; older runs do not.

    Where it does, it names a second text too if there was one.
    """
    return data.format is not None and all(
        getattr(data.columns, key) is not None
        for key in FORMATS[data.format].columns
        if key not in OPTIONAL
    )


def columns_note(data: DataSection, column_of: Mapping[str, str], table: Table) -> list[str]:
    """Return a note on the columns that a run reads of other rows, where they may surprise."""
    names = list(map(repr, column_of.values()))
    if not names_columns(data):
        return [
            f"{table.name} is read by {', '.join(names)}; the run does not name the columns "
            "that it was trained on"
        ]
    if (context := data.columns.input) and context not in table.columns:
        return [f"{table.name} has no column {context!r}"]
    unread = set(COLUMNS["text_pair"]) & set(table.columns) - set(column_of.values())
    if not data.task.kind.classifier or "text_pair" in column_of or not unread:
        return []
    listed = ", ".join(map(repr, sorted(unread)))
    return [f"{table.name}: not read: {listed}; the run was trained on {names[0]} alone"]


def find_columns(data: DataSection, train: Table, *, of_run: bool = False) -> Columns:
    """Return the format, given or found by the columns, and the column of each key that it reads.

    With `of_run` the section is that of a run: a second text is read only if it was trained on one,
    and instructions may have no input.

    Raises DataError, with the nearest name, where a column is absent, and for rows of preferences
    or pictures, which no format learns.
    """
    columns = train.columns
    hint = f"its columns: {', '.join(columns)}"
    recipe_columns = {
        key: name
        for key, name in data.columns
        if name is not None and not (of_run and key == "input" and name not in columns)
    }
    absent = [
        f"data.columns.{key}: {train.name} has no column {name!r}{did_you_mean(name, columns)}"
        for key, name in recipe_columns.items()
        if name not in columns
    ]
    if absent:
        raise DataError("\n".join(absent), hint)
    usual = {
        key: next(name for name in names if name in columns)
        for key, names in COLUMNS.items()
        if not set(names).isdisjoint(columns)
    }
    if of_run and names_columns(data):
        usual.pop("text_pair", None)
    column_of = usual | recipe_columns
    _refuse_other_rows(train, column_of)
    format_, why = data.format, "as data.format says"
    if format_ is None:
        format_, why = _find_format(column_of, data, train)
    keys = FORMATS[format_].columns
    missing = [
        f"a column {' or '.join(map(repr, COLUMNS[key]))}{_nearest_column(key, train)}"
        for key in keys
        if key not in column_of and key not in OPTIONAL
    ]
    if missing:
        raise DataError(f"{train.name}: format '{format_}' needs {'; '.join(missing)}", hint)
    read_keys = {key: column_of[key] for key in keys if key in column_of}
    read_columns = set(read_keys.values())
    read_keys |= {
        key: next(name for name in names if name in columns)
        for key, names in EXTRA_COLUMNS.get(format_, {}).items()
        if not set(names).isdisjoint(set(columns) - read_columns)
    }
    return Columns(
        format_, why, read_keys, [name for name in columns if name not in read_keys.values()]
    )


def _find_format(
    column_of: Mapping[str, str], data: DataSection, train: Table
) -> tuple[Format, str]:
    """Return the format that the columns tell, and why it is this one."""
    if "messages" in column_of:
        return "chat", BY_COLUMNS
    if "instruction" in column_of and "output" in column_of:
        return "instruction", BY_COLUMNS
    if "text" in column_of:
        if "label" not in column_of:
            return "text", BY_COLUMNS
        if data.labels:
            return "classification", "by data.labels"
        if column_of["label"] in train.classes:
            return "classification", "the dataset names its classes"
        return _format_of_labels(column_of["label"], train)
    other_half = {"output": "instruction", "instruction": "output"}
    needed_keys = [other_half[key] for key in other_half if key in column_of] or [
        "text",
        "messages",
    ]
    questions = [_nearest_column(key, train) for key in needed_keys]
    question = next(filter(None, questions), "")
    columns = ", ".join(map(repr, train.columns)) or "none"
    nested = [repr(name) for name in train.columns if _holds(train, name, list | dict)]
    reason = (
        f"; lists and objects, as in {', '.join(nested)}, are read as messages only"
        if nested
        else ""
    )
    hint = _FORMATS
    if nested:
        hint = f"write their texts in columns of their own; {hint}"
    if not train.typed:
        hint = (
            "the first line of the file is taken for its header: where it is a row, write a line "
            f"of names above it; {hint}"
        )
    raise DataError(f"{train.name}: its columns ({columns}) fit no format{question}{reason}", hint)


def _format_of_labels(column: str, train: Table) -> tuple[Format, str]:
    labels = [fields.get(column) for _, fields in train.readable()]
    labels = [label for label in labels if not is_missing(label)] or labels
    if all(isinstance(label, bool) for label in labels):
        return "classification", "labels are booleans"
    texts = train.typed and any(isinstance(label, str) for label in labels)
    if texts or not all(map(is_number, labels)):
        return "classification", "labels are words"
    if not all(map(is_whole, labels)):
        return "regression", "labels are numbers with a fraction"
    different = len({float(str(label)) for label in labels})
    if different > MANY:
        raise DataError(
            f"{train.name}: column {column!r} holds {different} different whole numbers, which may "
            "be classes or amounts",
            "--set data.format=classification or --set data.format=regression",
        )
    return "classification", "labels are whole numbers"


def label_question(columns: Columns, train: Table) -> list[str]:
    """Return a note on columns of plain texts whose few values may be classes; none of others."""
    if columns.format != "text" or columns.why != BY_COLUMNS:
        return []
    few_valued = []
    for name in columns.not_read:
        values = [fields.get(name) for _, fields in train.readable()]
        labels = [str(value) for value in values if not is_missing(value)]
        if 2 <= len(set(labels)) <= min(MANY, len(labels) // 2):
            few_valued.append(name)
    if not few_valued:
        return []
    names = ", ".join(map(repr, few_valued))
    return [f"to learn classes instead of the texts: --set data.columns.label=NAME, of {names}"]


def _nearest_column(key: str, train: Table) -> str:
    """Return a question about the column that is most like a usual name of `key`, or nothing.

    Only columns that can hold it are proposed.
    """
    columns = [name for name in train.columns if _can_hold(key, name, train)]
    near = next(filter(None, (nearest(name, columns) for name in COLUMNS[key])), None)
    return f" (is it {near!r}? then data.columns.{key}={near})" if near else ""


def _can_hold(key: str, column: str, train: Table) -> bool:
    values = (fields.get(column) for _, fields in train.readable())
    value = next((value for value in values if value is not None), None)
    if key == "label":
        return not isinstance(value, list | dict)
    return isinstance(value, list if key == "messages" else str)


def _refuse_other_rows(train: Table, column_of: Mapping[str, str]) -> None:
    """Raise DataError for rows of preferences and for rows with pictures, sound or films."""
    columns, used = set(train.columns), set(column_of.values())
    if {"chosen", "rejected"} <= columns and not {"chosen", "rejected"} & used:
        raise DataError(
            f"{train.name}: columns 'chosen' and 'rejected' are preference rows (DPO), which are "
            "not supported",
            "to learn the chosen answers alone: --set data.columns.output=chosen, or where they "
            "are conversations --set data.columns.messages=chosen",
        )
    for name in ("label", "kto_tag"):
        answered = "messages" in column_of or "output" in column_of
        if answered and name in columns and _holds(train, name, bool):
            raise DataError(
                f"{train.name}: column {name!r} says which answers are liked: these are preference "
                "rows (KTO), which are not supported",
                f"keep the rows whose {name} is true and leave the column out",
            )
    if {"text", "role", "parent_id"} <= columns:
        raise DataError(
            f"{train.name}: columns 'text', 'role' and 'parent_id' are single messages of "
            "conversations (OASST)",
            "write each conversation as one row: messages, a list of {role, content}",
        )
    for name in ("image", "images", "video", "videos", "audio", "audios"):
        if name in columns - used and _holds(train, name, list | dict | str | bytes):
            raise DataError(
                f"{train.name}: column {name!r} holds what no language model here reads",
                "leave out these rows, or the column where the texts stand alone",
            )


def _holds(train: Table, column: str, kind: Any) -> bool:
    """Return whether any row holds a value of a kind in a column, empty ones not counted."""
    values = (fields.get(column) for _, fields in train.readable())
    return any(isinstance(value, kind) and value not in ("", [], {}) for value in values)
