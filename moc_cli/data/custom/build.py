"""Build examples from rows of a custom dataset; name bad rows and those with nothing to learn."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from moc_cli.data.custom.labels import Classes, Label, number_label
from moc_cli.data.examples import (
    ChatExample,
    Example,
    InstructionExample,
    PairExample,
    Place,
    TextExample,
)
from moc_cli.data.prompts import HEADER
from moc_cli.data.source import BadRow, Fields, check_utf8, column_of_row, did_you_mean, shown
from moc_cli.recipe.sections import Format

ROLES = ("system", "user", "assistant")
BuildExample = Callable[[Fields, Place], Example]


class NothingToLearn(Exception):
    """A row is left out and counted; the message says why."""


def instruction_prompt(instruction: str, context: str = "") -> str:
    """Return the text before the output, the same in training and in scoring."""
    middle = f"### Input:\n{context}\n\n" if context.strip() else ""
    return f"{HEADER}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def template_hash() -> str:
    """Return the sha256 of the prompt template, for a run's fingerprints."""
    return hashlib.sha256(instruction_prompt("{instruction}", "{input}").encode()).hexdigest()


def example_builder(
    format_name: Format, columns: Mapping[str, str], task: str, labels: list[Label] | None
) -> BuildExample:
    """Return a function from a row and its place to an example.

    `columns` names the column of each key that the format reads. The function raises BadRow or
    NothingToLearn.
    """
    classes = Classes(labels or [])

    def instruction(fields: Fields, place: Place) -> Example:
        request = _filled(fields, columns["instruction"], "an empty instruction")
        context = _text(fields, columns["input"]) if "input" in columns else ""
        output = _filled(fields, columns["output"], "an empty output")
        return InstructionExample(task, instruction_prompt(request, context), output, place)

    def chat(fields: Fields, place: Place) -> Example:
        return ChatExample(task, _messages(fields, columns["messages"]), place)

    def text(fields: Fields, place: Place) -> Example:
        return TextExample(task, _filled(fields, columns["text"], "an empty text"))

    def pair(fields: Fields, place: Place) -> Example:
        first = _filled(fields, columns["text"], "an empty text")
        second = _text(fields, columns["text_pair"]) if "text_pair" in columns else None
        if format_name == "regression":
            return PairExample(task, first, second, number_label(fields, columns["label"]))
        return PairExample(task, first, second, classes.number(fields, columns["label"]))

    builders: dict[Format, BuildExample] = {"instruction": instruction, "chat": chat, "text": text}
    return builders.get(format_name, pair)


def _messages(fields: Fields, column: str) -> tuple[tuple[str, str], ...]:
    value = column_of_row(fields, column)
    if not isinstance(value, list):
        raise BadRow(f"'{column}' is {shown(value)}, not a list of messages")
    messages = tuple(_message(item, f"{column}[{index}]") for index, item in enumerate(value))
    answers = [content for role, content in messages if role == "assistant"]
    if not answers:
        raise BadRow(f"'{column}' has no message of the assistant to learn")
    if not any(answer.strip() for answer in answers):
        raise NothingToLearn("an empty answer")
    return messages


def _message(item: Any, where: str) -> tuple[str, str]:
    if not isinstance(item, dict):
        raise BadRow(f"{where} is {shown(item)}, not an object with role and content")
    for key in ("role", "content"):
        if key not in item:
            raise BadRow(f"{where} has no '{key}'{did_you_mean(key, item)}")
    role, content = item["role"], item["content"]
    if role not in ROLES:
        raise BadRow(f"{where}.role is {shown(role)}; allowed: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRow(f"{where}.content is {shown(content)}, not a text")
    return role, check_utf8(content, f"{where}.content")


def _filled(fields: Fields, column: str, reason: str) -> str:
    """Return the text of a column; raises NothingToLearn with `reason` where it is blank."""
    text = _text(fields, column)
    if not text.strip():
        raise NothingToLearn(reason)
    return text


def _text(fields: Fields, column: str) -> str:
    """Return the text of a column; an empty one for null."""
    value = column_of_row(fields, column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {shown(value)}, not a text")
    return check_utf8(value, column)
