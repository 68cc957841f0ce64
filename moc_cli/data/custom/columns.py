"""The format of a custom dataset, the columns that it reads, and its classes."""

from collections.abc import Mapping, Sequence

from moc_cli.data.custom.build import Label, class_label, is_number, is_whole
from moc_cli.data.custom.table import Table
from moc_cli.data.examples import Place
from moc_cli.data.source import BadRow, did_you_mean
from moc_cli.errors import DataError
from moc_cli.recipe.sections import DataSection, Format
from moc_cli.recipe.suggest import nearest
from moc_cli.recipe.tasks import FORMATS

USUAL = {
    "text": ("text", "sentence", "sentence1"),
    "text_pair": ("text_pair", "sentence2"),
    "label": ("label", "labels", "score"),
    "instruction": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer"),
    "messages": ("messages", "conversation", "conversations"),
}
OPTIONAL = ("text_pair", "input")
MANY = 50  # different whole numbers as labels; more of them may well be amounts
_FORMATS = (
    "formats by their columns: chat (messages), instruction (instruction, input, output), "
    "classification or regression (text, text_pair, label), text (text); columns of other names "
    "are given in data.columns, such as --set data.columns.text=NAME"
)


def find_columns(data: DataSection, train: Table) -> tuple[Format, dict[str, str]]:
    """Return the format, given or found by the columns, and the column of each key that it reads.

    Raises DataError, with the nearest name, where a column is absent.
    """
    columns = train.columns
    hint = f"its columns: {', '.join(columns)}"
    given = {key: name for key, name in data.columns if name is not None}
    absent = [
        f"data.columns.{key}: {train.name} has no column {name!r}{did_you_mean(name, columns)}"
        for key, name in given.items()
        if name not in columns
    ]
    if absent:
        raise DataError("\n".join(absent), hint)
    usual = {
        key: next(name for name in names if name in columns)
        for key, names in USUAL.items()
        if not set(names).isdisjoint(columns)
    }
    column_of = usual | given
    format_ = data.format or _find_format(column_of, data, train)
    keys = FORMATS[format_].columns
    missing = [
        f"a column {' or '.join(map(repr, USUAL[key]))}{_nearest_column(key, columns)}"
        for key in keys
        if key not in column_of and key not in OPTIONAL
    ]
    if missing:
        raise DataError(f"{train.name}: format '{format_}' needs {'; '.join(missing)}", hint)
    return format_, {key: column_of[key] for key in keys if key in column_of}


def _find_format(column_of: Mapping[str, str], data: DataSection, train: Table) -> Format:
    if "messages" in column_of:
        return "chat"
    if "instruction" in column_of and "output" in column_of:
        return "instruction"
    if "text" in column_of:
        if "label" not in column_of:
            return "text"
        return "classification" if data.labels else _format_of_labels(column_of["label"], train)
    other_half = {"output": "instruction", "instruction": "output"}
    wanted = [other_half[key] for key in other_half if key in column_of] or ["text", "messages"]
    questions = [_nearest_column(key, train.columns) for key in wanted]
    question = next(filter(None, questions), "")
    columns = ", ".join(map(repr, train.columns)) or "none"
    raise DataError(f"{train.name}: its columns ({columns}) fit no format{question}", _FORMATS)


def _format_of_labels(column: str, train: Table) -> Format:
    labels = [fields.get(column) for _, fields in train.readable()]
    texts = train.typed and any(isinstance(label, str) for label in labels)
    if texts or not all(map(is_number, labels)):
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


def _nearest_column(key: str, columns: Sequence[str]) -> str:
    """Return a question about the column that is most like a usual name of `key`, or nothing."""
    near = next(filter(None, (nearest(name, columns) for name in USUAL[key])), None)
    return f" (is it {near!r}? then data.columns.{key}={near})" if near else ""


def find_labels(train: Table, column: str) -> dict[Label, Place]:
    """Return the classes of the training rows and the place of the first row of each.

    They are sorted, unless texts and numbers are mixed; whole numbers of a CSV become numbers.
    """
    first_rows: dict[Label, Place] = {}
    for place, fields in train.readable():
        try:
            first_rows.setdefault(class_label(fields, column), place)
        except BadRow:
            continue  # named when the example is built
    # Only labels that a number writes back as they are: "01" is a name.
    if not train.typed and all(is_whole(text) and str(int(text)) == text for text in first_rows):
        first_rows = {int(label): place for label, place in first_rows.items()}
    mixed = len({type(label) for label in first_rows}) > 1
    return first_rows if mixed else dict(sorted(first_rows.items()))


def check_labels(train: Table, column: str, first_rows: Mapping[Label, Place]) -> None:
    """Raise DataError where classes are texts and numbers, or there is only one."""
    kinds = {type(label): (label, place) for label, place in first_rows.items()}
    if len(kinds) > 1:
        seen = [f"{label!r} ({unit} {number})" for label, (_, unit, number) in kinds.values()]
        raise DataError(
            f"{train.name}: '{column}' holds both texts and whole numbers: {' and '.join(seen)}"
        )
    if len(first_rows) == 1:
        (only,) = first_rows
        raise DataError(
            f"{train.name}: '{column}' is {only!r} in every row; two classes are needed"
        )
