"""Rows from a local folder or from the Hugging Face hub, every bad one named."""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from moc_cli.errors import DataError
from moc_cli.recipe.suggest import nearest
from moc_cli.recipe.tasks import HubSplit

SUFFIXES = (".jsonl.gz", ".jsonl")
_LISTED = 20  # rows or ranges of rows that one sentence names
T = TypeVar("T")
Fields = dict[str, Any]


class BadRow(Exception):
    """A row cannot be used; the message says why, without naming the row."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or nothing."""
    near = nearest(word, known)
    return f"; did you mean '{near}'?" if near else ""


def take(fields: Fields, name: str, kind: type[T]) -> T:
    """Return a column of a row; raises BadRow where it is absent or of another type."""
    if name not in fields:
        raise BadRow(f"no '{name}'{did_you_mean(name, fields)}")
    value = fields[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadRow(f"'{name}' is {json.dumps(value, default=str)[:60]}, not {_KINDS[kind]}")
    return value


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


def build_rows(rows: Iterable[bytes | Fields], where: str, build: Callable[[Fields], T]) -> list[T]:
    """Build an example of every row; raises DataError naming all bad ones by their number from 1.

    Rows are lines of JSON or columns that have been read already.
    """
    built: list[T] = []
    complaints: dict[str, list[int]] = {}
    for number, row in enumerate(rows, 1):
        try:
            built.append(build(_fields(row) if isinstance(row, bytes) else row))
        except BadRow as error:
            complaints.setdefault(str(error), []).append(number)
    if complaints:
        raise DataError(
            "\n".join(f"{where}, {numbered(bad)}: {why}" for why, bad in complaints.items())
        )
    if not built:
        raise DataError(f"{where} has no rows")
    return built


def read_hub(source: HubSplit, build: Callable[[Fields], T]) -> list[T]:
    """Build every row of a split on the hub; raises DataError when it is out of reach."""
    import datasets

    built: list[T] = []
    for config in source.configs:
        where = f"{source.repo}{f' ({config})' if config else ''}, split {source.split}"
        try:
            rows = datasets.load_dataset(
                source.repo, config, split=source.split, revision=source.revision
            )
        # The hub's client raises a dozen unrelated classes, for no network, no such set and more.
        except Exception as error:
            raise DataError(
                f"cannot load {where} from the Hugging Face hub: {first_line(error)}",
                "set data.path to a folder of <task>/<split>.jsonl.gz, or go online "
                "(and unset HF_HUB_OFFLINE) so that it can be downloaded",
            ) from error
        built += build_rows(rows, where, build)
    return built


def _find(folder: Path, task: str, split: str) -> Path:
    if not folder.is_dir():
        raise DataError(
            f"data.path: no folder {folder}",
            "give a folder of <task>/<split>.jsonl.gz, or leave data.path out to use the hub",
        )
    found = [path for suffix in SUFFIXES if (path := folder / task / f"{split}{suffix}").is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{found[0]} and {found[1].name} both exist", "keep one of them")
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


def _fields(line: bytes) -> Fields:
    if not line.strip():
        raise BadRow("an empty line")
    try:
        fields = json.loads(line)
    except ValueError:
        raise BadRow("not JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise BadRow("not a JSON object")
    return fields


def numbered(numbers: list[int], unit: str = "line") -> str:
    """Ascending numbers as `line 3` or `lines 3, 7-9`; of very many only the first."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if len(words) > _LISTED:
        words = [*words[:_LISTED], f"... ({len(numbers):,} in all)"]
    return f"{unit if len(numbers) == 1 else f'{unit}s'} {', '.join(words)}"


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
