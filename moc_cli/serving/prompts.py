"""Prompts: where they are read from, and the frame a model was trained to expect around them.

commonsense  the instruction in LLM-Adapters' evaluation prompt; one question at a time
chat         the tokenizer's own chat template, with all turns of the conversation
raw          the text as it is; turns of a conversation on lines of their own
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from jinja2 import TemplateError

from moc_cli.data.custom.build import instruction_prompt
from moc_cli.data.prompts import eval_prompt
from moc_cli.errors import DataError, MocError
from moc_cli.recipe.suggest import choices

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Frame = Literal["commonsense", "instruction", "chat", "raw"]
TEMPLATES = ("auto", "commonsense", "instruction", "chat", "raw")
SINGLE = ("commonsense", "instruction")  # frames in which every question stands alone
_FORMATS: dict[str, Frame] = {"instruction": "instruction", "chat": "chat", "text": "raw"}
SHOWN = 5  # bad lines named in an error


class Turn(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def check_frame(asked: str) -> None:
    """Raise MocError for a template that does not exist."""
    if asked not in TEMPLATES:
        raise MocError(f"--template is '{asked}'{choices(asked, TEMPLATES)}")


def trained_frame(suite: str, format: str | None) -> Frame | None:
    """The frame that a run's rows were trained in, by its suite and the format of own rows."""
    return _FORMATS.get(format or "") if suite == "custom" else "commonsense"


def choose_frame(
    asked: str, trained: Frame | None, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Frame, str]:
    """Return the frame asked for, and why; `auto` takes the one that a run was trained in.

    Where that is not known, the tokenizer's chat template is taken, or else none.
    """
    check_frame(asked)
    if asked == "chat" and not tokenizer.chat_template:
        raise MocError("this tokenizer has no chat template", "use --template raw or commonsense")
    if asked != "auto":
        return cast(Frame, asked), "as asked"
    if trained is not None:
        return trained, "what this run was trained on"
    if tokenizer.chat_template:
        return "chat", "the tokenizer's own"
    return "raw", "the tokenizer has no chat template"


def check_system(system: str | None, frame: Frame) -> None:
    """Raise MocError where a system message has no place in the frame."""
    if system is not None and frame != "chat":
        raise MocError(
            f"--system has no place in the template '{frame}'",
            "it needs --template chat, and a tokenizer that has one",
        )


def encode(tokenizer: "PreTrainedTokenizerBase", frame: Frame, turns: Sequence[Turn]) -> list[int]:
    """Return the tokens after which the model is to go on; the last turn is the user's."""
    if frame == "chat":
        try:
            text = tokenizer.apply_chat_template(
                [dict(turn) for turn in turns], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise MocError(
                f"the tokenizer's chat template refuses this conversation: {error}",
                "use --template raw, or leave out --system",
            ) from error
        # The template writes its special tokens itself.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if frame == "commonsense":
        text = eval_prompt(turns[-1]["content"])
    elif frame == "instruction":
        text = instruction_prompt(turns[-1]["content"])
    else:
        text = "\n".join(turn["content"] for turn in turns)
    return list(tokenizer(text, verbose=False)["input_ids"])


def read_prompts(path: Path) -> list[str]:
    """Read a prompt from each line, or from `prompt` of each line of a .jsonl file.

    Empty lines are passed over. Raises DataError naming every line that holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, ValueError) else error.strerror
        raise DataError(f"{path} cannot be read: {reason}") from error
    return split_prompts(text, str(path), jsonl=path.suffix == ".jsonl")


def split_prompts(text: str, name: str, *, jsonl: bool = False) -> list[str]:
    """The prompts in the lines of a text; `name` says in errors where it came from."""
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not jsonl:
        prompts = [line.rstrip("\r") for _, line in lines]
    else:
        found = list(_json_prompts(lines))
        wrong = [f"{name}:{number}: {why}" for number, _, why in found if why]
        if wrong:
            more = f"\nand {len(wrong) - SHOWN} more lines" if len(wrong) > SHOWN else ""
            raise DataError("\n".join(wrong[:SHOWN]) + more, 'a line is {"prompt": "..."}')
        prompts = [prompt for _, prompt, _ in found]
    if not prompts:
        raise DataError(f"{name} holds no prompt", "it needs one on each line")
    return prompts


def _json_prompts(lines: list[tuple[int, str]]) -> Iterator[tuple[int, str, str]]:
    """Yield each line's number, its prompt, and what is wrong with it."""
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            yield number, "", f"no JSON: {error}"
            continue
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if isinstance(prompt, str) and prompt.strip():
            yield number, prompt, ""
        elif isinstance(row, dict) and "prompt" in row:
            yield number, "", "'prompt' is empty" if prompt == "" else "'prompt' is no text"
        else:
            yield number, "", "it has no 'prompt'"
