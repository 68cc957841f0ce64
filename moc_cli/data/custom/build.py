"""Build examples from rows of a custom dataset; name bad rows and those with nothing to learn."""

import hashlib
from collections.abc import Callable, Mapping, Sequence

from moc_cli.data.custom.columns import Columns
from moc_cli.data.custom.labels import Classes, Label, number_label
from moc_cli.data.custom.messages import NothingToLearn, read_chat
from moc_cli.data.examples import (
    Example,
    InstructionExample,
    PairExample,
    Place,
    TextExample,
)
from moc_cli.data.prompts import HEADER
from moc_cli.data.source import BadRow, Fields, check_utf8, column_of_row, shown
from moc_cli.recipe.sections import DataSection, Format

BuildExample = Callable[[Fields, Place], Example]


def instruction_prompt(
    instruction: str,
    context: str = "",
    system: str = "",
    history: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the text before the output, the same in training and in scoring.

    `system` takes the place of the first lines; `history` are earlier questions and answers.
    """
    earlier = "".join(
        f"### Instruction:\n{asked}\n\n### Response:\n{answer}\n\n" for asked, answer in history
    )
    middle = f"### Input:\n{context}\n\n" if context.strip() else ""
    start = f"{system or HEADER}\n\n{earlier}"
    return f"{start}### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def template_hash() -> str:
    """Return the sha256 of the prompt template, for a run's fingerprints."""
    return hashlib.sha256(instruction_prompt("{instruction}", "{input}").encode()).hexdigest()


def example_builder(data: DataSection, found: Columns, labels: list[Label] | None) -> BuildExample:
    """Return a function from a row and its place to an example.

    `found` names the format and the column of each key that it reads. The function raises BadRow
    or NothingToLearn.
    """
    task, columns = data.tasks[0], found.column_of
    classes = Classes(labels or [])

    def instruction(fields: Fields, place: Place) -> Example:
        request = _filled(fields, columns["instruction"], "an empty instruction")
        context = _text(fields, columns["input"]) if "input" in columns else ""
        output = _filled(fields, columns["output"], "an empty output")
        system = _text(fields, columns["system"]) if columns.get("system") in fields else ""
        prompt = instruction_prompt(request, context, system, _history(fields, columns))
        return InstructionExample(task, prompt, output, place)

    def chat(fields: Fields, place: Place) -> Example:
        return read_chat(fields, columns, task, place, merge_system=data.merge_system)

    def text(fields: Fields, place: Place) -> Example:
        return TextExample(task, _filled(fields, columns["text"], "an empty text"))

    def pair(fields: Fields, place: Place) -> Example:
        first = _filled(fields, columns["text"], "an empty text")
        second = _text(fields, columns["text_pair"]) if "text_pair" in columns else None
        if found.format == "regression":
            return PairExample(task, first, second, number_label(fields, columns["label"]))
        return PairExample(task, first, second, classes.number(fields, columns["label"]))

    builders: dict[Format, BuildExample] = {"instruction": instruction, "chat": chat, "text": text}
    return builders.get(found.format, pair)


def _history(fields: Fields, columns: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return the earlier questions and answers of an instruction row."""
    value = fields.get(columns.get("history", "")) or []
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in pairs):
        raise BadRow(f"'history' is {shown(value)}, not a list of [question, answer]")
    return [(check_utf8(asked, "history"), check_utf8(said, "history")) for asked, said in pairs]


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
