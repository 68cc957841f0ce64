"""The prompt of an instruction row: alpaca's, plain lines, or the user's own template.

A template is a text with the placeholders {instruction}, {input} and {system}. A line that holds
nothing but {input} or {system} is left out where the row has none. Other braces are text.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from moc_cli.data.prompts import HEADER
from moc_cli.data.source import BadRow
from moc_cli.errors import DataError
from moc_cli.recipe.paths import WORDS
from moc_cli.recipe.suggest import choices, nearest

NAMES = WORDS["data.template"]
PLACEHOLDERS = ("instruction", "input", "system")
_PLAIN = "{system}\n{instruction}\n{input}\n"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def read_frame(template: str) -> str:
    """Return `data.template` with the text of a file in place of its path.

    Raises DataError where it is neither a name, a file nor a text, and for unknown placeholders.
    """
    if template in NAMES:
        return template
    text = template if "{" in template else _read_file(template)
    names = dict.fromkeys(_PLACEHOLDER.findall(text))
    allowed = f"allowed: {', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}"
    errors = []
    for name in names:
        if name not in PLACEHOLDERS:
            near = nearest(name, PLACEHOLDERS)
            question = f"; did you mean {{{near}}}?" if near else ""
            errors.append(f"data.template: unknown placeholder {{{name}}}{question}")
    if "instruction" not in names:
        errors.append("data.template: it lacks {instruction}")
    if errors:
        raise DataError("\n".join(errors), allowed)
    return text


def _read_file(template: str) -> str:
    path = Path(template).expanduser()
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"data.template: {template[:200]} cannot be read: {error}") from error
    raise DataError(
        f"data.template: no file {template[:200]}{choices(template, NAMES)}, or a file with "
        "{instruction}, {input} and {system}"
    )


def instruction_prompt(
    instruction: str,
    context: str = "",
    system: str = "",
    history: Sequence[tuple[str, str]] = (),
    *,
    template: str = "alpaca",
) -> str:
    """Return the text before the output, the same in training and in scoring.

    `history` are earlier questions and answers. In alpaca's prompt `system` takes the place of the
    first lines. Raises BadRow where the template has no place for what is given.
    """
    if template == "alpaca":
        return _alpaca(instruction, context, system, history)
    if history:
        raise BadRow("the template has no place for 'history'; alpaca and chat have")
    text = _PLAIN if template == "plain" else template
    values = {"instruction": instruction, "input": context, "system": system}
    for name, value in values.items():
        if value.strip() and f"{{{name}}}" not in text:
            raise BadRow(f"the template has no place for '{name}': it lacks {{{name}}}")
    lines = [
        line
        for line in text.splitlines(keepends=True)
        if line.strip() not in ("{input}", "{system}") or values[line.strip()[1:-1]].strip()
    ]
    return _PLACEHOLDER.sub(lambda match: values[match.group(1)], "".join(lines))


def frame_text(template: str) -> str:
    """Return the frame with its placeholders; the name alone for the tokenizer's chat template."""
    if template == "alpaca":
        return _alpaca("{instruction}", "{input}", "", ())
    return _PLAIN if template == "plain" else template


def frame_hash(template: str) -> str:
    """Return the sha256 of the frame, for a run's fingerprints."""
    return hashlib.sha256(frame_text(template).encode()).hexdigest()


def _alpaca(instruction: str, context: str, system: str, history: Sequence[tuple[str, str]]) -> str:
    earlier = "".join(
        f"### Instruction:\n{question}\n\n### Response:\n{answer}\n\n"
        for question, answer in history
    )
    middle = f"### Input:\n{context}\n\n" if context.strip() else ""
    start = f"{system or HEADER}\n\n{earlier}"
    return f"{start}### Instruction:\n{instruction}\n\n{middle}### Response:\n"
