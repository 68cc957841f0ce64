"""Rows without labels, to be classified: their texts, and all their columns to be written again."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from moc_cli.data.custom.columns import columns_note, names_columns
from moc_cli.data.custom.table import Table, read_table
from moc_cli.data.examples import PairExample
from moc_cli.data.source import BadRow, BadRows, Fields, check_utf8, text_or_empty
from moc_cli.errors import DataError
from moc_cli.recipe.names import COLUMNS
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.suggest import did_you_mean


@dataclass(frozen=True)
class UnlabelledRows:
    """Rows of a file: `examples` to classify (their labels mean nothing), and all `fields`.

    `notes` say what was decided on reading.
    """

    examples: list[PairExample]
    fields: list[Fields]
    notes: list[str] = field(default_factory=list)


def read_unlabelled(data: DataSection, file: Path) -> UnlabelledRows:
    """Read a file with the columns that a run's classifier reads; it needs no column of labels.

    Raises DataError where a column is absent, and naming every row without a text or with text that
    cannot be written again.
    """
    if not file.is_file():
        raise DataError(f"--file {file}: no such file")
    table = read_table(file, data.quoting)
    columns = _columns(data, table)
    rows = UnlabelledRows([], [], list(table.notes))
    if data.custom:
        keys = dict(zip(("text", "text_pair"), columns, strict=False))
        rows.notes.extend(columns_note(data, keys, table))
    bad_rows = BadRows()
    for place, fields in table.rows:
        try:
            if isinstance(fields, BadRow):
                raise fields
            for name, value in fields.items():
                check_utf8(name + json.dumps(value, ensure_ascii=False, default=str), name)
            texts = [text_or_empty(fields, column) for column in columns]
            if not texts[0].strip():
                raise BadRow(f"'{columns[0]}' is empty")
            second = texts[1] if len(texts) > 1 else None
            rows.examples.append(PairExample(data.tasks[0], texts[0], second, 0))
            rows.fields.append(fields)
        except BadRow as error:
            bad_rows.add(place, error)
    bad_rows.raise_if_any()
    return rows


def _columns(data: DataSection, table: Table) -> tuple[str, ...]:
    """The columns of the text and of the second one, in a benchmark's words or the recipe's.

    Of older runs, which do not name them, the usual ones.
    """
    available = table.columns
    if not data.custom:
        alternatives: list[tuple[str, ...]] = [(column,) for column in data.task.columns]
    else:
        recipe_names = [data.columns.text, data.columns.text_pair]
        usual = [COLUMNS["text"], COLUMNS["text_pair"]]
        alternatives = [
            (recipe_name,) if recipe_name else usual_names
            for recipe_name, usual_names in zip(recipe_names, usual, strict=True)
        ]
        if recipe_names[1] is None and (
            names_columns(data) or not set(alternatives[1]) & set(available)
        ):
            alternatives = alternatives[:1]
    chosen = [next((name for name in names if name in available), None) for names in alternatives]
    missing = [
        f"a column {' or '.join(map(repr, names))}{did_you_mean(names[0], available)}"
        for names, column in zip(alternatives, chosen, strict=True)
        if column is None
    ]
    if missing:
        raise DataError(
            f"{table.name} lacks {' and '.join(missing)}", f"its columns: {', '.join(available)}"
        )
    return tuple(column for column in chosen if column is not None)
