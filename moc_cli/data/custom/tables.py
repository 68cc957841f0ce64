"""One's own rows as they lie in files or on the hub: numbered, bad ones with the reason beside.

    .jsonl   an object a line; blank lines are skipped and counted
    .json    one array of objects
    .csv     a header, then rows; separated by commas, or by semicolons or tabs where the header is
    .tsv     the same, separated by tabs
    .parquet

Each but the last may be compressed (.gz). Text is UTF-8, with or without a byte order mark.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moc_cli.data.source import BadRow, Fields, did_you_mean, first_line
from moc_cli.errors import DataError

SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # how UTF-16 begins
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Table:
    """The rows of one file or split: (number, columns or why it cannot be read), and blank lines.

    `unit` is what the numbers count; `typed` says that values have types, which CSV has not.
    """

    name: str
    unit: str = "line"
    typed: bool = True
    rows: list[tuple[int, Fields | BadRow]] = field(default_factory=list)
    blank: int = 0

    @property
    def columns(self) -> list[str]:
        """The columns that any readable row has, in the order of their appearance."""
        readable = (fields for _, fields in self.rows if isinstance(fields, dict))
        return list(dict.fromkeys(name for fields in readable for name in fields))


def read_tables(path: str) -> dict[str, Table]:
    """Read the parts of a file (train alone), a folder or a set on the hub, by split.

    Raises DataError, telling every file that cannot be read at all.
    """
    files = _find(path)
    if files is None:
        return _read_hub(path)
    tables, problems = {}, []
    for split, file in files.items():
        try:
            tables[split] = read_table(file)
        except DataError as error:
            problems.append(error.message)
    if problems:
        raise DataError("\n".join(problems))
    return tables


def read_table(file: Path) -> Table:
    """Read one file; raises DataError where it is damaged as a whole, or holds no row."""
    reader = _READERS[_suffix(file)]
    try:
        table = reader(file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
    if not table.rows:
        raise DataError(f"{file} has no rows")
    return table


def _find(path: str) -> dict[str, Path] | None:
    """Return the file of each split; None for what can only be on the hub."""
    place = Path(path).expanduser()
    if place.is_file():
        if _suffix(place) not in _READERS:
            raise DataError(f"{place} is none of {', '.join(_READERS)}", "see data.path")
        return {"train": place}
    if place.is_dir():
        return _folder(place)
    if _HUB_ID.fullmatch(path) and _suffix(place) not in _READERS:
        return None
    beside = [one.name for one in place.parent.iterdir()] if place.parent.is_dir() else []
    raise DataError(f"data.path: no file or folder {path}{did_you_mean(place.name, beside)}")


def _folder(folder: Path) -> dict[str, Path]:
    inside = sorted(one for one in folder.iterdir() if one.is_file() and _suffix(one) in _READERS)
    found: dict[str, Path] = {}
    for split, names in SPLITS.items():
        files = [one for one in inside if one.name.split(".")[0] in names]
        if len(files) > 1:
            raise DataError(f"{files[0]} and {files[1].name} are both {split}", "keep one of them")
        found |= dict.fromkeys([split], files[0]) if files else {}
    if "train" not in found:
        there = ", ".join(one.name for one in inside[:10]) or "no file of rows"
        raise DataError(f"no train file in {folder}; it holds {there}", "name it train.csv, ...")
    return found


def _suffix(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    return suffix if suffix != ".parquet" or name == file.name.lower() else ".parquet.gz"


def _bytes(file: Path) -> bytes:
    if file.name.lower().endswith(".gz"):
        with gzip.open(file) as stream:
            raw = stream.read()
    else:
        raw = file.read_bytes()
    if raw.startswith(_WIDE):
        raise DataError(f"{file} is UTF-16 text; save it as UTF-8")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise DataError(f"{file} is empty")
    return raw


def _read_jsonl(file: Path) -> Table:
    raw = _bytes(file)
    if raw.lstrip().startswith(b"["):
        raise DataError(
            f"{file} is a JSON array, not an object a line", "name it .json, or write a line a row"
        )
    table = Table(str(file))
    for number, line in enumerate(raw.splitlines(), 1):
        if line.strip():
            table.rows.append((number, _object(line)))
        else:
            table.blank += 1
    return table


def _object(line: bytes) -> Fields | BadRow:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("not UTF-8 text")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at character {error.colno}")
    except RecursionError:
        return BadRow("not JSON that can be read: nested too deeply")
    return fields if isinstance(fields, dict) else BadRow("not a JSON object")


def _read_json(file: Path) -> Table:
    try:
        items = json.loads(_bytes(file).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        hint = "if every line is a row, name it .jsonl" if error.msg == "Extra data" else None
        raise DataError(f"{file}, line {error.lineno}: not JSON: {error.msg}", hint) from error
    except RecursionError as error:
        raise DataError(f"{file} cannot be read: nested too deeply") from error
    if not isinstance(items, list):
        raise DataError(f"{file} holds no JSON array of rows", "a .jsonl file has a row a line")
    table = Table(str(file), unit="row")
    for number, item in enumerate(items, 1):
        good = isinstance(item, dict)
        table.rows.append((number, item if good else BadRow("not a JSON object")))
    return table


def _read_csv(file: Path) -> Table:
    # Bytes that are no UTF-8 stay visible as lone surrogates, and are told row by row.
    text = _bytes(file).decode("utf-8", errors="surrogateescape")
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=_delimiter(file, text), strict=True
    )
    table = Table(str(file), typed=False)
    header: list[str] | None = None
    start = 1
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells) and len(cells) <= 1:
                table.blank += 1
            elif header is None:
                header = _header(file, cells)
            elif len(cells) != len(header):
                why = f"{len(cells)} fields, the header has {len(header)}"
                table.rows.append((start, BadRow(why)))
            else:
                table.rows.append((start, dict(zip(header, cells, strict=True))))
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}, line {start}: quotes that do not match ({error})") from error
    return table


def _delimiter(file: Path, text: str) -> str:
    head = text.lstrip().splitlines()[0]
    if _suffix(file) == ".tsv":
        return "\t"
    return next((mark for mark in (",", ";", "\t") if mark in head), ",")


def _header(file: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
    if twice is not None:
        raise DataError(f"{file}: the header names the column {twice!r} twice")
    return names


def _read_parquet(file: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    table = Table(str(file), unit="row")
    try:
        with parquet.ParquetFile(file) as source:
            for batch in source.iter_batches():
                for row in batch.to_pylist():
                    table.rows.append((len(table.rows) + 1, row))
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} cannot be read as Parquet: {first_line(error)}") from error
    return table


_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(name: str) -> dict[str, Table]:
    import datasets

    try:
        found = datasets.load_dataset(name)
    # The hub's client raises a dozen unrelated classes, for no network, no such set and more.
    except Exception as error:
        raise DataError(
            f"data.path: no file or folder {name}, and it cannot be loaded from the Hugging Face "
            f"hub: {first_line(error)}",
            "give a path, or go online (and unset HF_HUB_OFFLINE) so that it can be downloaded",
        ) from error
    tables: dict[str, Table] = {}
    for split, names in SPLITS.items():
        one = next((part for part in names if part in found), None)
        if one is not None:
            rows: list[tuple[int, Fields | BadRow]] = list(enumerate(map(dict, found[one]), 1))
            tables[split] = Table(f"{name}, split {one}", unit="row", rows=rows)
    if "train" not in tables:
        raise DataError(f"{name} has no split 'train'; it has {', '.join(found)}")
    return tables
