"""Chats as a tokenizer's own template writes them, and which of their tokens are to be learned.

Learned are what the assistant says and the token that ends its turn. A template may mark that
itself ({% generation %}). Otherwise turn i is what the chat up to it has more than the chat before
it with the assistant's header; both have to be beginnings of the whole chat. White space that a
template writes after the turn's end token belongs to the next turn.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moc_cli.data.custom.bad_rows import Complaints
from moc_cli.data.examples import ChatExample
from moc_cli.data.source import BadRow, first_line
from moc_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]


def chat_tokens(
    examples: Sequence[ChatExample], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[list[int], list[bool]]]:
    """Return each chat's tokens, and of each token whether the assistant has to learn it.

    Raises DataError where the tokenizer has no template, and naming all chats that it refuses.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"format 'chat' needs a chat template, and the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} has none",
            "take a model that was tuned for chats, or write the rows as instruction and output",
        ) from error
    read = _by_marks if _MARKED.search(template) else _by_prefixes
    found, complaints = [], Complaints()
    for example in examples:
        try:
            found.append(read(_messages(example), tokenizer))
        except BadRow as error:
            complaints.add(example.place, str(error))
    complaints.tell()
    return found


def _messages(example: ChatExample) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in example.messages]


def _by_marks(
    messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[bool]]:
    found = _apply(
        tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [bool(mark) for mark in found["assistant_masks"]]
    if not any(learned):
        raise BadRow("the chat template marks nothing of it as the assistant's")
    return list(found["input_ids"]), learned


def _by_prefixes(
    messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[bool]]:
    whole = _apply(tokenizer, messages, tokenize=False)
    spans = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:place], tokenize=False, add_generation_prompt=True)
        until = _apply(tokenizer, messages[: place + 1], tokenize=False)
        if not (whole.startswith(until) and until.startswith(before)):
            raise BadRow(
                f"the chat template writes message {place} otherwise in the middle of a chat than "
                "at its end, so that the answer's tokens cannot be told"
            )
        spans.append((len(before), len(until)))
    ids, places = _places(whole, tokenizer)
    learned = [False] * len(ids)
    for start, end in spans:
        inside = [n for n, (first, last) in enumerate(places) if last > start and first < end]
        for number in _without_tail(inside, ids, tokenizer):
            learned[number] = True
    return ids, learned


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: list[Any], **options: Any) -> Any:
    """Write a chat by its template; raises BadRow where the template refuses it."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise BadRow(f"the chat template refuses it: {first_line(error)}") from None


def _places(text: str, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[Span]]:
    """Return the tokens of a text, and the characters of each: (first, behind the last)."""
    if tokenizer.is_fast:
        found = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        return list(found["input_ids"]), list(found["offset_mapping"])
    raise DataError(
        f"format 'chat' needs a fast tokenizer, and {tokenizer.name_or_path} has none: only that "
        "says which characters a token stands for"
    )


def _without_tail(
    inside: list[int], ids: list[int], tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """Leave out the white space that follows the last special token of a turn, if it has one."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ends = [place for place, number in enumerate(inside) if ids[number] in special]
    if not ends:
        return inside
    tail = inside[ends[-1] + 1 :]
    blank = not str(tokenizer.decode([ids[number] for number in tail])).strip()
    return inside[: ends[-1] + 1] if blank else inside
