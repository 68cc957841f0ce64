"""Prompts: how they are read, and the template that a model was trained to expect around them.

commonsense  the instruction in LLM-Adapters' evaluation prompt; one question at a time
instruction  the instruction in the prompt of custom datasets; one question at a time
chat         the tokenizer's own chat template, with all messages of the conversation
raw          the text as it is; messages of a conversation on lines of their own
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, cast

from moc_cli.data.custom.chat import apply_template
from moc_cli.data.custom.frame import instruction_prompt
from moc_cli.data.prompts import eval_prompt
from moc_cli.data.source import BadRow, BadRows, parse_object, take
from moc_cli.errors import DataError, MocError
from moc_cli.models.tokens import prompt_ids
from moc_cli.recipe.suggest import choices
from moc_cli.recipe.tasks import Frame

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = ("auto", "commonsense", "instruction", "chat", "raw")
SINGLE = ("commonsense", "instruction")  # frames in which every question stands alone


class Message(TypedDict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


# What a frame makes of a conversation and data.template; of `chat` the tokenizer writes it.
_TEXTS: dict[Frame, Callable[[Sequence[Message], str], str]] = {
    "commonsense": lambda messages, _: eval_prompt(messages[-1]["content"]),
    "instruction": lambda messages, template: instruction_prompt(
        messages[-1]["content"], template=template
    ),
    "raw": lambda messages, _: "\n".join(message["content"] for message in messages),
}


def check_frame(template: str) -> None:
    """Raise MocError for a template that does not exist."""
    if template not in TEMPLATES:
        raise MocError(f"--template is '{template}'{choices(template, TEMPLATES)}")


def choose_frame(
    template: str, trained: Frame | None, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Frame, str]:
    """Return the frame of the option --template, and why; `auto` takes the one of the training.

    Where that is not known, the tokenizer's chat template is taken, or else none.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise MocError("this tokenizer has no chat template", "use --template raw or commonsense")
    if template != "auto":
        return cast(Frame, template), "as asked"
    if trained is not None:
        return trained, "what this run was trained on"
    if tokenizer.chat_template:
        return "chat", "the tokenizer's own"
    return "raw", "the tokenizer has no chat template"


def check_system(system: str | None, frame: Frame) -> None:
    """Raise MocError where the frame has no system message."""
    if system is not None and frame != "chat":
        raise MocError(
            f"--system has no place in the template '{frame}'",
            "it needs --template chat, and a tokenizer that has one",
        )


def encode(
    tokenizer: "PreTrainedTokenizerBase",
    frame: Frame,
    messages: Sequence[Message],
    template: str = "alpaca",
) -> list[int]:
    """Return the tokens that the model continues; the last message is the user's.

    `template` is `data.template` of a run, for the frame `instruction`.
    """
    if frame == "chat":
        try:
            text = apply_template(tokenizer, messages, tokenize=False, add_generation_prompt=True)
        except BadRow as error:
            raise MocError(
                f"this conversation: {error}", "use --template raw, or leave out --system"
            ) from error
        # The template writes its special tokens itself.
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return prompt_ids(tokenizer, [_TEXTS[frame](messages, template)])[0]


def read_prompts(path: Path) -> list[str]:
    """Read a prompt from each line, or from `prompt` of each line of a .jsonl file.

    Empty lines are skipped. Raises DataError naming every line without a prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not UTF-8" if isinstance(error, ValueError) else error.strerror
        raise DataError(f"{path} cannot be read: {reason}") from error
    return split_prompts(text, str(path), jsonl=path.suffix == ".jsonl")


def split_prompts(text: str, name: str, *, jsonl: bool = False) -> list[str]:
    """Return the prompts in the lines of a text; `name` says in errors where it came from."""
    prompts, bad_rows = [], BadRows()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            prompts.append(_prompt_of_json(line) if jsonl else line.rstrip("\r"))
        except BadRow as error:
            bad_rows.add((name, "line", number), error)
    bad_rows.raise_if_any('a line is {"prompt": "..."}')
    if not prompts:
        raise DataError(f"{name} holds no prompt", "it needs one on each line")
    return prompts


def _prompt_of_json(line: str) -> str:
    prompt = take(parse_object(line.encode()), "prompt", str)
    if not prompt.strip():
        raise BadRow("'prompt' is empty")
    return prompt
