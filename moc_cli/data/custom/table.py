"""Read one file of a custom dataset into numbered rows.

    .jsonl .ndjson  one object per line; blank lines are skipped and counted
    .json           one array of objects, an object that holds it under a usual name, or .jsonl
    .csv            a header, then rows; separated by commas, or by the semicolons or tabs of the
                    header
    .tsv .tab       the same, separated by tabs
    .txt            one text per line
    .parquet .arrow

Text files are UTF-8, with or without a byte order mark, and may be compressed (.gz). A new format
is one more entry of `READERS`. `datasets` does not read the text files: it guesses types (the label
"01" becomes 1.0, "NA" becomes null), drops blank lines, and stops at the first bad row without its
line.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from moc_cli.data.examples import Place
from moc_cli.data.source import (
    NOT_UTF8,
    UTF8_HINT,
    BadRow,
    Fields,
    library_errors,
    parse_object,
)
from moc_cli.errors import DataError, first_line
from moc_cli.recipe.sections import Quoting

WRAPPERS = ("data", "rows", "examples", "instances", "records", "items", "train")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")
_TOO_MANY_DIGITS = re.compile(rb"\d{4301,}")  # more than Python turns into a number


@dataclass
class Table:
    """The rows of one file or split, each with its place: its columns, or why it is bad.

    `typed` is False where every value is a text, as in CSV. `blank` counts the blank lines.
    `classes` holds for columns of class numbers the names that the dataset gives them.
    `notes` say what was decided on reading.
    """

    name: str
    typed: bool = True
    rows: list[tuple[Place, Fields | BadRow]] = field(default_factory=list)
    blank: int = 0
    notes: list[str] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)

    def add(self, unit: str, number: int, row: Fields | BadRow) -> None:
        """Append a row; `unit` is what the numbers count."""
        self.rows.append(((self.name, unit, number), row))

    def readable(self) -> Iterator[tuple[Place, Fields]]:
        """Yield the rows whose columns could be read."""
        for place, row in self.rows:
            if not isinstance(row, BadRow):
                yield place, row

    @property
    def columns(self) -> list[str]:
        """The columns that any row has, in the order of their appearance."""
        return list(dict.fromkeys(name for _, fields in self.readable() for name in fields))


def suffix_of(file: Path) -> str | None:
    """Return the suffix by which a file is read; None for a file of another kind."""
    name = file.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), None)


def read_table(file: Path, quoting: Quoting | None = None) -> Table:
    """Read one file; raises DataError where it is damaged or has no rows."""
    suffix = suffix_of(file)
    if suffix is None:
        raise DataError(
            f"{file} is not one of {', '.join(READERS)}", "save it as .csv, .jsonl or .parquet"
        )
    try:
        table = READERS[suffix](file, quoting)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {first_line(error)}") from error
    if not table.rows:
        raise DataError(f"{file} has no rows")
    return table


def joined(tables: Sequence[Table]) -> Table:
    """Return the rows of several files as one table, in their order."""
    first, *other_tables = tables
    if not other_tables:
        return first
    table = Table(f"{first.name} and {len(other_tables)} more", all(part.typed for part in tables))
    for part in tables:
        table.rows += part.rows
        table.blank += part.blank
        table.notes += part.notes
        table.classes |= part.classes
    return table


def table_of(name: str, rows: Iterable[Any]) -> Table:
    """Return the table of rows that are objects already, numbered from 1."""
    table = Table(name)
    for number, row in enumerate(rows, 1):
        table.add("row", number, row if isinstance(row, dict) else BadRow("not a JSON object"))
    return table


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


def _read_json(file: Path, quoting: Quoting | None, lines: bool = False) -> Table:
    raw = _read_bytes(file)
    by_line = lines and not raw.lstrip().startswith(b"[")
    document = None if by_line else _whole_json(raw, file)
    return _json_lines(raw, file) if document is None else _json_rows(document, file)


def _whole_json(raw: bytes, file: Path) -> list[Any] | dict[str, Any] | None:
    """Return the value of a file; None where several follow one another, as in JSON lines."""
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}, line {line}: {NOT_UTF8}", UTF8_HINT) from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            return None
        raise DataError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"{file} cannot be read: nested too deeply") from error
    except ValueError as error:  # of a number that is too long
        digits = _TOO_MANY_DIGITS.search(raw)
        line = raw.count(b"\n", 0, digits.start() if digits else 0) + 1
        raise DataError(f"{file}, line {line}: a number of too many digits") from error
    return value if isinstance(value, list | dict) else [value]


def _json_rows(value: list[Any] | dict[str, Any], file: Path) -> Table:
    """Return the rows of an array, or of an object that holds one under a usual name."""
    if isinstance(value, list):
        return table_of(str(file), value)
    name = next((key for key in WRAPPERS if isinstance(value.get(key), list)), None)
    if name is None:
        raise DataError(
            f"{file} holds no JSON array of rows, but one object with the keys "
            f"{', '.join(map(repr, list(value)[:10])) or '(none)'}",
            f"write an array of rows, or put it under {', '.join(WRAPPERS)}; a .jsonl file has "
            "one row per line",
        )
    table = table_of(str(file), value[name])
    other_keys = [key for key in value if key != name]
    not_read = f"; not read: {', '.join(other_keys)}" if other_keys else ""
    table.notes.append(f"{file}: its rows are under {name!r}{not_read}")
    return table


def _json_lines(raw: bytes, file: Path) -> Table:
    table = Table(str(file))
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            table.blank += 1
            continue
        try:
            table.add("line", number, parse_object(line))
        except BadRow as error:
            table.add("line", number, error)
    table.blank -= raw.endswith(b"\n")
    return table


def _read_csv(file: Path, quoting: Quoting | None, delimiter: str | None = None) -> Table:
    """Read with the quotes of CSV, or where these do not hold with quotes as characters.

    They do not hold where a quoted field never ends or would swallow lines that are complete rows.
    """
    # Bytes that are not UTF-8 become lone surrogates, so that their rows can be named one by one.
    text = _read_bytes(file).decode("utf-8", errors="surrogateescape")
    header = next((line for line in text.split("\n") if line.strip()), "")
    if delimiter is None:
        delimiter = next((mark for mark in (",", ";", "\t") if mark in header), ",")
    plain: Table | None = None
    if quoting != "csv":
        try:
            plain = _csv_table(file, _split_lines(text, delimiter))
        except DataError:  # of the header, which may be right with its quotes
            if quoting == "none" or '"' not in header:
                raise
        if plain is not None and (quoting == "none" or '"' not in text):
            return plain
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    try:
        records = []
        for cells in reader:
            records.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        if plain is not None and _is_regular(plain):
            plain.notes.append(f"{file}: quotation marks are text; as CSV, line {line} has no end")
            return plain
        raise DataError(
            f"{file}, line {line}: quotes that do not match ({error})",
            "--set data.quoting=none reads quotation marks as text",
        ) from error
    swallowed = delimiter == "\t" and any(
        "\n" in cell and delimiter in cell for _, cells in records for cell in cells
    )
    quoted = _csv_table(file, records)
    if plain is not None:
        fewer = len(plain.rows) - len(quoted.rows)
        if swallowed or (delimiter in header and _is_regular(plain) and fewer > 0):
            hidden = f"quotation marks are text; as CSV they would hide {fewer} rows"
            plain.notes.append(f"{file}: {hidden}")
            return plain
    if several := sum(any("\n" in cell for cell in cells) for _, cells in records):
        quoted.notes.append(f"{file}: {several} rows go over several lines, in quotation marks")
    return quoted


def _split_lines(text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    lines = re.split("\r\n|\n|\r", text)
    if not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        yield number, line.split(delimiter)


def _csv_table(file: Path, records: Iterable[tuple[int, list[str]]]) -> Table:
    """Return the table of records, each with its first line; the first one is the header."""
    table = Table(str(file), typed=False)
    columns: list[str] = []
    for number, cells in records:
        if len(cells) <= 1 and not any(cell.strip() for cell in cells):
            table.blank += 1
        elif not columns:
            columns = [cell.strip() or f"column {place}" for place, cell in enumerate(cells, 1)]
            twice = [name for name, count in Counter(columns).items() if count > 1]
            if twice:
                raise DataError(f"{file}: the header names the column {twice[0]!r} twice")
        elif len(cells) == len(columns):
            table.add("line", number, dict(zip(columns, cells, strict=True)))
        else:
            reason = f"{len(cells)} fields, the header has {len(columns)}"
            table.add("line", number, BadRow(reason))
    return table


def _is_regular(table: Table) -> bool:
    return not any(isinstance(row, BadRow) for _, row in table.rows)


def _read_txt(file: Path, quoting: Quoting | None) -> Table:
    text = _read_bytes(file).decode("utf-8", errors="surrogateescape")
    table = Table(str(file), typed=False, notes=[f"{file}: each line is a text of its own"])
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        if line.strip():
            table.add("line", number, {"text": line.removesuffix("\r")})
        else:
            table.blank += 1
    return table


def _read_parquet(file: Path, quoting: Quoting | None) -> Table:
    from pyarrow import parquet

    with library_errors(f"{file} cannot be read as Parquet"):
        rows = parquet.ParquetFile(file).read()
        table = table_of(str(file), rows.to_pylist())
        if b"huggingface" in (rows.schema.metadata or {}):
            import datasets

            table.classes = _class_names(datasets.Features.from_arrow_schema(rows.schema))
    return table


def _read_arrow(file: Path, quoting: Quoting | None) -> Table:
    import datasets

    with library_errors(f"{file} cannot be read as Arrow"):
        return table_of_dataset(str(file), datasets.Dataset.from_file(str(file)))


def table_of_dataset(name: str, dataset: Any) -> Table:
    """Return the table of a `datasets.Dataset`; pictures are not decoded."""
    table = table_of(name, dataset.with_format("arrow")[:].to_pylist())
    table.classes = _class_names(dataset.features)
    return table


def _class_names(features: Any) -> dict[str, list[str]]:
    import datasets

    return {
        column: list(feature.names)
        for column, feature in features.items()
        if isinstance(feature, datasets.ClassLabel) and feature.names
    }


Reader = Callable[[Path, Quoting | None], Table]
_TEXT_READERS: dict[str, Reader] = {
    ".jsonl": partial(_read_json, lines=True),
    ".ndjson": partial(_read_json, lines=True),
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".tab": partial(_read_csv, delimiter="\t"),
    ".txt": _read_txt,
}
READERS: dict[str, Reader] = (
    _TEXT_READERS
    | {f"{suffix}.gz": reader for suffix, reader in _TEXT_READERS.items()}
    | {".parquet": _read_parquet, ".arrow": _read_arrow}
)
