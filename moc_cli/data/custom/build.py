"""Build examples from rows of a custom dataset; name bad rows and those with nothing to learn."""

from collections.abc import Callable, Mapping
from typing import Any

from moc_cli.data.custom.columns import Columns
from moc_cli.data.custom.frame import instruction_prompt, read_frame
from moc_cli.data.custom.labels import Classes, Label, number_label
from moc_cli.data.custom.messages import NothingToLearn, read_chat
from moc_cli.data.examples import (
    Example,
    InstructionExample,
    PairExample,
    Place,
    TextExample,
)
from moc_cli.data.source import BadRow, Fields, check_utf8, shown, text_or_empty
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.tasks import Format

_CHAT = {"messages": "messages", "system": "system"}
BuildExample = Callable[[Fields, Place], Example]


def example_builder(
    data: DataSection, columns: Columns, labels: list[Label] | None
) -> BuildExample:
    """Return a function from a row and its place to an example.

    `columns` names the format and the column of each key that it reads. The function raises BadRow
    or NothingToLearn. Raises DataError where `data.template` cannot be used.
    """
    task, column_of = data.tasks[0], columns.column_of
    template = read_frame(data.template) if columns.framed else ""
    classes = Classes(labels or [])

    def instruction(fields: Fields, place: Place) -> Example:
        request = _filled(fields, column_of["instruction"], "an empty instruction")
        context = (
            text_or_empty(fields, column_of["input"]) if column_of.get("input") in fields else ""
        )
        output = _filled(fields, column_of["output"], "an empty output")
        system = (
            text_or_empty(fields, column_of["system"]) if column_of.get("system") in fields else ""
        )
        history = _history(fields, column_of)
        if template == "chat":
            turns = _turns(request, context, output, history)
            row = {"messages": turns, "system": system}
            return read_chat(row, _CHAT, task, place, merge_system=data.merge_system)
        prompt = instruction_prompt(request, context, system, history, template=template)
        return InstructionExample(task, prompt, output, place)

    def chat(fields: Fields, place: Place) -> Example:
        return read_chat(fields, column_of, task, place, merge_system=data.merge_system)

    def text(fields: Fields, place: Place) -> Example:
        return TextExample(task, _filled(fields, column_of["text"], "an empty text"))

    def pair(fields: Fields, place: Place) -> Example:
        first = _filled(fields, column_of["text"], "an empty text")
        second = text_or_empty(fields, column_of["text_pair"]) if "text_pair" in column_of else None
        number = classes.number if columns.classes else number_label
        return PairExample(task, first, second, number(fields, column_of["label"]))

    builders: dict[Format, BuildExample] = {"instruction": instruction, "chat": chat, "text": text}
    builders |= {"classification": pair, "regression": pair}
    return builders[columns.format]


def _turns(
    request: str, context: str, output: str, history: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    """Return an instruction row as messages, of which only the last is learned."""
    turns: list[dict[str, Any]] = []
    for earlier_question, answer in history:
        turns.append({"role": "user", "content": earlier_question})
        turns.append({"role": "assistant", "content": answer, "weight": 0})
    question = f"{request}\n\n{context}" if context.strip() else request
    turns.append({"role": "user", "content": question})
    return [*turns, {"role": "assistant", "content": output}]


def _history(fields: Fields, columns: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the earlier questions and answers of an instruction row."""
    value = fields.get(columns.get("history", "")) or []
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise BadRow(f"'history' is {shown(value)}, not a list of [question, answer]")
    return [
        (check_utf8(question, "history"), check_utf8(answer, "history"))
        for question, answer in pairs
    ]


def _filled(fields: Fields, column: str, reason: str) -> str:
    """Return the text of a column; raises NothingToLearn with `reason` where it is blank."""
    text = text_or_empty(fields, column)
    if not text.strip():
        raise NothingToLearn(reason)
    return text
