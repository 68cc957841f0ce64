"""Rows of a local folder or of the Hugging Face hub; every bad row is named with its place."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from moc_cli.data.examples import Place
from moc_cli.errors import DataError, first_line
from moc_cli.recipe.suggest import did_you_mean
from moc_cli.recipe.tasks import HubSplit

SUFFIXES = (".jsonl.gz", ".jsonl")
LISTED = 20  # ranges of rows in one line of an error, and lines in the error; the rest is counted
NOT_UTF8 = "not UTF-8 text"
UTF8_HINT = "save the file as UTF-8; from Latin-1: iconv -f ISO-8859-1 -t UTF-8 FILE > NEW"
T = TypeVar("T")
Fields = dict[str, Any]


class BadRow(Exception):
    """A row cannot be used; the message says why, without naming the row."""


class BadRows:
    """Collects the bad rows of all files, so that one error names them all.

    Rows of one file that are bad for one reason share a line.
    """

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str, str], list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def add(self, place: Place, reason: BadRow) -> None:
        """Note a bad row."""
        name, unit, number = place
        self._numbers.setdefault((name, unit, str(reason)), []).append(number)

    def raise_if_any(self, hint: str | None = None) -> None:
        """Raise DataError naming every bad row, if there are any."""
        if self._numbers:
            not_utf8 = any(reason.endswith(NOT_UTF8) for _, _, reason in self._numbers)
            raise DataError("\n".join(self.lines()), hint or (UTF8_HINT if not_utf8 else None))

    def lines(self) -> list[str]:
        """Return a line for each file and reason, with the numbers of its rows."""
        lines = [
            f"{name}, {numbered(sorted(numbers), unit)}: {reason}"
            for (name, unit, reason), numbers in self._numbers.items()
        ]
        if unlisted := sum(map(len, list(self._numbers.values())[LISTED:])):
            lines[LISTED:] = [f"... and {unlisted:,} more bad rows"]
        return lines


def take(fields: Fields, name: str, kind: type[T]) -> T:
    """Return a column of a row; raises BadRow where it is absent or of another type."""
    value = column_of_row(fields, name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadRow(f"'{name}' is {shown(value)}, not {_KINDS[kind]}")
    return value


def column_of_row(fields: Fields, column: str) -> Any:
    """Return the value of a column; raises BadRow, with the nearest name, where it is absent."""
    if column not in fields:
        raise BadRow(f"no '{column}'{did_you_mean(column, fields)}")
    return fields[column]


def check_utf8(text: str, column: str) -> str:
    """Return the text; raises BadRow for half characters, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"'{column}' is {NOT_UTF8}") from None
    return text


def text_or_empty(fields: Fields, column: str) -> str:
    """Return the text of a column, an empty one for null; raises BadRow for anything else."""
    if column_of_row(fields, column) is None:
        return ""
    return check_utf8(take(fields, column, str), column)


def shown(value: Any) -> str:
    """Return a value as JSON, cut to 60 characters, for an error."""
    try:
        return json.dumps(value, default=str, ensure_ascii=False)[:60]
    except (RecursionError, ValueError, TypeError):
        return f"a {type(value).__name__} that cannot be shown"


_KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def read_local(path: str | Path, task: str, split: str, build: Callable[[Fields], T]) -> list[T]:
    """Build every row of `<path>/<task>/<split>.jsonl.gz` (or .jsonl).

    Raises DataError for an absent or damaged file, or naming every bad row.
    """
    file = _find(Path(path).expanduser(), task, split)
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        return build_rows(_intact(lines, file), str(file), build)


def build_rows(rows: Iterable[bytes | Fields], name: str, build: Callable[[Fields], T]) -> list[T]:
    """Build an example of every row; raises DataError naming all bad ones by their number from 1.

    Rows are lines of JSON or columns that have been read already.
    """
    examples: list[T] = []
    bad_rows = BadRows()
    for number, row in enumerate(rows, 1):
        try:
            examples.append(build(parse_object(row) if isinstance(row, bytes) else row))
        except BadRow as error:
            unit = "line" if isinstance(row, bytes) else "row"
            bad_rows.add((name, unit, number), error)
    bad_rows.raise_if_any()
    if not examples:
        raise DataError(f"{name} has no rows")
    return examples


def parse_object(line: bytes) -> Fields:
    """Return the JSON object of a line; raises BadRow."""
    if not line.strip():
        raise BadRow("an empty line")
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRow(NOT_UTF8) from None
    except json.JSONDecodeError as error:
        raise BadRow(f"not JSON: {error.msg} at character {error.colno}") from None
    except RecursionError:
        raise BadRow("not JSON that can be read: nested too deeply") from None
    except ValueError:
        raise BadRow("a number of too many digits") from None
    if not isinstance(fields, dict):
        raise BadRow("not a JSON object")
    return fields


def read_hub(source: HubSplit, build: Callable[[Fields], T]) -> list[T]:
    """Build every row of a split on the hub; raises DataError where it cannot be loaded."""
    examples: list[T] = []
    for config in source.configs:
        name = f"{source.repo}{f' ({config})' if config else ''}, split {source.split}"
        rows = load_from_hub(
            name,
            "set data.path to a folder of <task>/<split>.jsonl.gz, or go online",
            source.repo,
            config,
            split=source.split,
            revision=source.revision,
        )
        examples += build_rows(rows, name, build)
    return examples


@contextmanager
def library_errors(message: str) -> Iterator[None]:
    """Within it `datasets` or Arrow reads; each of their many classes of errors is a DataError."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{message}: {first_line(error)}") from error


def load_from_hub(name: str, instead: str, *arguments: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset`; raises DataError whose hint begins with `instead`."""
    import datasets

    try:
        return datasets.load_dataset(*arguments, **options)
    # The hub's client raises a dozen unrelated classes, for no network, no such dataset and more.
    except Exception as error:
        reason = first_line(error)
        hint = f"{instead} (and unset HF_HUB_OFFLINE) so that it can be downloaded"
        if "Config name is missing" in reason:
            hint = "choose one of its configurations: --set data.config_name=NAME"
        raise DataError(
            f"{name} cannot be loaded from the Hugging Face hub: {reason}", hint
        ) from error


def _find(folder: Path, task: str, split: str) -> Path:
    if not folder.is_dir():
        raise DataError(
            f"data.path: no folder {folder}",
            "give a folder of <task>/<split>.jsonl.gz, or leave data.path out to use the hub",
        )
    paths = [folder / task / f"{split}{suffix}" for suffix in SUFFIXES]
    paths = [path for path in paths if path.is_file()]
    if len(paths) == 1:
        return paths[0]
    if paths:
        raise DataError(f"{paths[0]} and {paths[1].name} both exist", "keep one of them")
    tasks = sorted(
        {path.parent.name for suffix in SUFFIXES for path in folder.glob(f"*/*{suffix}")}
    )
    if task in tasks:
        raise DataError(f"no {split}.jsonl.gz or {split}.jsonl in {folder / task}")
    raise DataError(
        f"no {task}/{split}.jsonl.gz or .jsonl in {folder}{did_you_mean(task, tasks)}",
        f"tasks there: {', '.join(tasks)}" if tasks else _deeper(folder, task),
    )


def _deeper(folder: Path, task: str) -> str:
    below = [path.parent for path in sorted(folder.glob(f"*/{task}")) if path.is_dir()]
    return f"set data.path: {below[0]}" if below else "the folder holds no tasks at all"


def _intact(lines: Iterable[bytes], file: Path) -> Iterator[bytes]:
    """Yield the lines of a file; raises DataError where a compressed file breaks off."""
    count = 0
    try:
        for count, line in enumerate(lines, 1):  # noqa: B007 - the count is reported below
            yield line
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{file} is damaged after line {count}: {error}") from error


def numbered(numbers: list[int], unit: str = "line") -> str:
    """Return ascending numbers as `line 3` or `lines 3, 7-9`; of very many only the first."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    if len(texts) > LISTED:
        texts = [*texts[:LISTED], f"... ({len(numbers):,} in all)"]
    return f"{unit if len(numbers) == 1 else f'{unit}s'} {', '.join(texts)}"
