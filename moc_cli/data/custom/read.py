"""Read a custom dataset, from files or from the Hugging Face hub, into numbered rows.

    .jsonl   one object per line; blank lines are skipped and counted
    .json    one array of objects
    .csv     a header, then rows; separated by commas, or by the semicolons or tabs of the header
    .tsv     the same, separated by tabs
    .parquet

Text files are UTF-8, with or without a byte order mark, and may be compressed (.gz). A new format
is one more entry of `READERS`. `datasets` does not read the files: it guesses types (the label "01"
becomes 1.0, "NA" becomes null), drops blank lines, and stops at the first bad row without its line.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moc_cli.data.source import (
    BadRow,
    Fields,
    did_you_mean,
    first_line,
    load_from_hub,
    parse_object,
)
from moc_cli.errors import DataError

SPLITS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Table:
    """The rows of one file or split, each with its number: its columns, or why it is bad.

    `unit` is what the numbers count. `typed` is False where every value is a text, as in CSV.
    `blank` counts the blank lines.
    """

    name: str
    unit: str = "row"
    typed: bool = True
    rows: list[tuple[int, Fields | BadRow]] = field(default_factory=list)
    blank: int = 0

    def readable(self) -> Iterator[tuple[int, Fields]]:
        """Yield the rows whose columns could be read."""
        for number, row in self.rows:
            if not isinstance(row, BadRow):
                yield number, row

    @property
    def columns(self) -> list[str]:
        """The columns that any row has, in the order of their appearance."""
        return list(dict.fromkeys(name for _, fields in self.readable() for name in fields))


def read_tables(path: str) -> dict[str, Table]:
    """Read the splits of a file (train alone), of a folder, or of a dataset on the hub.

    Raises DataError naming every file that cannot be read at all.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = _split_files(place)
    elif place.is_file():
        files = {"train": place}
    elif _HUB_ID.fullmatch(path) and _suffix(place) is None:
        return _read_hub(path)
    else:
        siblings = [file.name for file in place.parent.iterdir()] if place.parent.is_dir() else []
        raise DataError(f"data.path: no file or folder {path}{did_you_mean(place.name, siblings)}")
    tables, errors = {}, []
    for split, file in files.items():
        try:
            tables[split] = read_table(file)
        except DataError as error:
            errors.append(error)
    if errors:
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        raise DataError("\n".join(error.message for error in errors), "; ".join(hints) or None)
    return tables


def read_table(file: Path) -> Table:
    """Read one file; raises DataError where it is damaged or has no rows."""
    suffix = _suffix(file)
    if suffix is None:
        raise DataError(f"{file} is not one of {', '.join(READERS)}", "see data.path")
    try:
        table = READERS[suffix](file)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
    if not table.rows:
        raise DataError(f"{file} has no rows")
    return table


def _suffix(file: Path) -> str | None:
    name = file.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def _split_files(folder: Path) -> dict[str, Path]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and _suffix(file))
    splits: dict[str, Path] = {}
    for split, names in SPLITS.items():
        matching = [file for file in files if file.name.split(".")[0] in names]
        if len(matching) > 1:
            raise DataError(
                f"{matching[0]} and {matching[1].name} are both {split}", "keep one of them"
            )
        if matching:
            splits[split] = matching[0]
    if "train" not in splits:
        names_there = ", ".join(file.name for file in files[:10]) or "no file of rows"
        raise DataError(
            f"no train file in {folder}; it holds {names_there}", "name it train.csv, ..."
        )
    return splits


def _read_bytes(file: Path) -> bytes:
    raw = file.read_bytes()
    if file.name.lower().endswith(".gz"):
        raw = gzip.decompress(raw)
    if raw.startswith(_UTF_16):
        raise DataError(f"{file} is UTF-16 text; save it as UTF-8")
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise DataError(f"{file} is empty")
    return raw


def _read_jsonl(file: Path) -> Table:
    raw = _read_bytes(file)
    if raw.lstrip().startswith(b"["):
        raise DataError(
            f"{file} is a JSON array, not one object per line",
            "name it .json, or write one row per line",
        )
    table = Table(str(file), unit="line")
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            table.blank += 1
            continue
        try:
            table.rows.append((number, parse_object(line)))
        except BadRow as error:
            table.rows.append((number, error))
    return table


def _read_json(file: Path) -> Table:
    try:
        items = json.loads(_read_bytes(file).decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: not UTF-8 text") from error
    except json.JSONDecodeError as error:
        hint = "if every line is a row, name it .jsonl" if error.msg == "Extra data" else None
        raise DataError(f"{file}, line {error.lineno}: not JSON: {error.msg}", hint) from error
    except RecursionError as error:
        raise DataError(f"{file} cannot be read: nested too deeply") from error
    if not isinstance(items, list):
        raise DataError(f"{file} holds no JSON array of rows", "a .jsonl file has one row per line")
    not_object = BadRow("not a JSON object")
    rows = [item if isinstance(item, dict) else not_object for item in items]
    return Table(str(file), rows=list(enumerate(rows, 1)))


def _read_csv(file: Path, delimiter: str | None = None) -> Table:
    # Bytes that are not UTF-8 become lone surrogates, so that their rows can be named one by one.
    text = _read_bytes(file).decode("utf-8", errors="surrogateescape")
    if delimiter is None:
        header = text.lstrip().splitlines()[0]
        delimiter = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    table = Table(str(file), unit="line", typed=False)
    columns: list[str] = []
    first_line_of_row = 1
    try:
        for cells in reader:
            row: Fields | BadRow
            if len(cells) <= 1 and not any(cell.strip() for cell in cells):
                table.blank += 1
            elif not columns:
                columns = [cell.strip() for cell in cells]
                if twice := [name for name in columns if columns.count(name) > 1]:
                    raise DataError(f"{file}: the header names the column {twice[0]!r} twice")
            else:
                if len(cells) == len(columns):
                    row = dict(zip(columns, cells, strict=True))
                else:
                    row = BadRow(f"{len(cells)} fields, the header has {len(columns)}")
                table.rows.append((first_line_of_row, row))
            first_line_of_row = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{file}, line {first_line_of_row}: quotes that do not match ({error})"
        ) from error
    return table


def _read_tsv(file: Path) -> Table:
    return _read_csv(file, delimiter="\t")


def _read_parquet(file: Path) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.ParquetFile(file).read().to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file} cannot be read as Parquet: {first_line(error)}") from error
    return Table(str(file), rows=list(enumerate(rows, 1)))


_TEXT_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
}
READERS = (
    _TEXT_READERS
    | {f"{suffix}.gz": reader for suffix, reader in _TEXT_READERS.items()}
    | {".parquet": _read_parquet}
)


def _read_hub(name: str) -> dict[str, Table]:
    dataset = load_from_hub(
        f"data.path: no file or folder {name}, and it", "give a path, or go online", name
    )
    tables: dict[str, Table] = {}
    for split, names in SPLITS.items():
        if part := next((part for part in names if part in dataset), None):
            tables[split] = Table(f"{name}, split {part}")
            tables[split].rows += [(n, dict(row)) for n, row in enumerate(dataset[part], 1)]
    if "train" not in tables:
        raise DataError(f"{name} has no split 'train'; it has {', '.join(dataset)}")
    return tables
