"""What is made of the columns of a table before its rows are read.

Numbers of classes become the names that the dataset gives them, and `prompt` and `completion` of
messages, as TRL writes them, become one conversation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moc_cli.data.custom.labels import Label
from moc_cli.data.custom.table import Table
from moc_cli.data.source import BadRow, Fields, shown
from moc_cli.recipe.sections import DataSection

_TURNS = ("prompt", "completion")


def join_turns(tables: Mapping[str, Table], data: DataSection) -> list[str]:
    """Make `prompt` and `completion` of messages one column `messages`; return a note of it.

    Of the prompt no answer is learned.
    """
    lists = [
        table
        for table in tables.values()
        if all(
            any(isinstance(row.get(name), list) for _, row in table.readable()) for name in _TURNS
        )
    ]
    if data.format not in (None, "chat") or not lists:
        return []
    for table in lists:
        _change(table, _joined)
    return ["prompt and completion are one conversation, of which only the completion is learned"]


def name_classes(table: Table, column: str, labels: Sequence[Label] | None) -> None:
    """Put the names of classes in place of their numbers, where the dataset names them.

    `labels` are those of the recipe; where they are numbers, the numbers stay.
    """
    names = table.classes.get(column)
    if not names or any(isinstance(label, int) for label in labels or ()):
        return

    def named(fields: Fields) -> Fields:
        value = fields.get(column)
        if isinstance(value, int) and 0 <= value < len(names):
            return fields | {column: names[value]}
        return fields

    _change(table, named)


def _change(table: Table, change: Callable[[Fields], Fields]) -> None:
    for number, (place, fields) in enumerate(table.rows):
        if isinstance(fields, BadRow):
            continue
        try:
            table.rows[number] = (place, change(fields))
        except BadRow as error:
            table.rows[number] = (place, error)


def _joined(fields: Fields) -> Fields:
    for name in _TURNS:
        if not isinstance(fields.get(name), list):
            raise BadRow(f"'{name}' is {shown(fields.get(name))}, not a list of messages")
    prompt: list[Any] = [
        turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in fields["prompt"]
    ]
    other_fields = {name: value for name, value in fields.items() if name not in _TURNS}
    return {"messages": prompt + fields["completion"]} | other_fields
