"""One's own columns to examples: what is wrong with a row, and which rows have nothing to learn."""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from moc_cli.data.custom.columns import is_number, is_whole
from moc_cli.data.examples import (
    ChatExample,
    Example,
    InstructionExample,
    PairExample,
    Place,
    TextExample,
)
from moc_cli.data.prompts import HEADER
from moc_cli.data.source import BadRow, Fields, did_you_mean
from moc_cli.recipe.schema import Format

ROLES = ("system", "user", "assistant")
Label = int | str
Build = Callable[[Fields, Place], Example]


class NothingToLearn(Exception):
    """A row is left out and counted; the message says why."""


def instruction_prompt(instruction: str, given: str = "") -> str:
    """The text before the output, the same in training and in scoring."""
    middle = f"### Input:\n{given}\n\n" if given.strip() else ""
    return f"{HEADER}\n\n### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def template_hash() -> str:
    """Sha256 of the prompt's template, which a run's fingerprints state."""
    return hashlib.sha256(instruction_prompt("{instruction}", "{input}").encode()).hexdigest()


def builder(
    kind: Format, columns: Mapping[str, str], task: str, labels: list[Label] | None
) -> Build:
    """Return what makes an example of a row; it raises BadRow or NothingToLearn.

    `columns` names the column of each key that the format reads. Its second argument is
    the row's place.
    """
    places = label_places(labels or [])

    def pair(fields: Fields, place: Place) -> Example:
        first = _filled(fields, columns["text"], "an empty text")
        second = _text(fields, columns["text_pair"]) if "text_pair" in columns else None
        if kind == "regression":
            return PairExample(task, first, second, _amount(fields, columns["label"]))
        label = class_label(fields, columns["label"])
        if label not in places:
            raise BadRow(_unknown(columns["label"], label, labels or []))
        return PairExample(task, first, second, places[label])

    def instruction(fields: Fields, place: Place) -> Example:
        asked = _filled(fields, columns["instruction"], "an empty instruction")
        given = _text(fields, columns["input"]) if "input" in columns else ""
        output = _filled(fields, columns["output"], "an empty output")
        return InstructionExample(task, instruction_prompt(asked, given), output)

    def chat(fields: Fields, place: Place) -> Example:
        return ChatExample(task, _messages(fields, columns["messages"]), place)

    def text(fields: Fields, place: Place) -> Example:
        return TextExample(task, _filled(fields, columns["text"], "an empty text"))

    makers: dict[Format, Build] = {"instruction": instruction, "chat": chat, "text": text}
    return makers.get(kind, pair)


def label_places(labels: list[Label]) -> dict[Label, int]:
    """Return the place of each label, under its text too: a CSV knows no numbers."""
    texts: dict[Label, int] = {str(label): place for place, label in enumerate(labels)}
    return texts | {label: place for place, label in enumerate(labels)}


def class_label(fields: Fields, column: str) -> Label:
    """Return a row's class, blanks around it left out; raises BadRow."""
    value = _column(fields, column)
    if _absent(value) or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"'{column}' is empty: a row needs its label")
    if isinstance(value, str):
        return _intact(value, column).strip()
    if is_whole(value):
        return int(value)
    if is_number(value):
        raise BadRow(f"'{column}' is {value}, not a class; data.format: regression learns numbers")
    raise BadRow(f"'{column}' is {shown(value)}, not a class (a text or a whole number)")


def shown(value: Any) -> str:
    """Return a short picture of a value as JSON."""
    return json.dumps(value, default=str, ensure_ascii=False)[:60]


def _amount(fields: Fields, column: str) -> float:
    value = _column(fields, column)
    if _absent(value) or (isinstance(value, str) and not value.strip()):
        raise BadRow(f"'{column}' is empty: a row needs its label")
    if not is_number(value):
        raise BadRow(f"'{column}' is {shown(value)}, not a number")
    return float(value)


def _messages(fields: Fields, column: str) -> tuple[tuple[str, str], ...]:
    value = _column(fields, column)
    if not isinstance(value, list):
        raise BadRow(f"'{column}' is {shown(value)}, not a list of messages")
    turns = tuple(_turn(message, f"{column}[{place}]") for place, message in enumerate(value))
    answers = [content for role, content in turns if role == "assistant"]
    if not answers:
        raise BadRow(f"'{column}' has no assistant turn to learn")
    if not any(answer.strip() for answer in answers):
        raise NothingToLearn("an empty answer")
    return turns


def _turn(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise BadRow(f"{where} is {shown(message)}, not an object with role and content")
    for key in ("role", "content"):
        if key not in message:
            raise BadRow(f"{where} has no '{key}'{did_you_mean(key, message)}")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise BadRow(f"{where}.role is {shown(role)}; allowed: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise BadRow(f"{where}.content is {shown(content)}, not a text")
    return role, _intact(content, f"{where}.content")


def _filled(fields: Fields, column: str, otherwise: str) -> str:
    text = _text(fields, column)
    if not text.strip():
        raise NothingToLearn(otherwise)
    return text


def _text(fields: Fields, column: str) -> str:
    """Return a column's text; an empty one for null."""
    value = _column(fields, column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"'{column}' is {shown(value)}, not a text")
    return _intact(value, column)


def _column(fields: Fields, column: str) -> Any:
    if column not in fields:
        raise BadRow(f"no '{column}'{did_you_mean(column, fields)}")
    return fields[column]


def _intact(text: str, where: str) -> str:
    """Return a text that UTF-8 can hold; no tokenizer takes another."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRow(f"'{where}' is not UTF-8 text") from None
    return text


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)


def _unknown(column: str, label: Label, labels: list[Label]) -> str:
    known = ", ".join(map(str, labels[:10])) + (", ..." if len(labels) > 10 else "")
    near = did_you_mean(str(label), map(str, labels))
    return f"'{column}' is {shown(label)}, which is none of the labels{near} (labels: {known})"
