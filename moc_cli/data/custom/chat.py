"""The tokens of conversations by the tokenizer's chat template, and which of them are learned.

Learned are the assistant's messages and the token that ends each. A template may mark them itself
({% generation %}). Otherwise the tokens of message i are what the conversation up to it has more
than the conversation before it with the assistant's header; both must be a prefix of the complete
conversation. White space that a template writes after the end token belongs to the next message.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moc_cli.data.examples import ChatExample
from moc_cli.data.source import BadRow, BadRows, first_line
from moc_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
Tokens = tuple[list[int], list[bool]]  # the ids, and whether each is learned


def chat_tokens(
    examples: Sequence[ChatExample], tokenizer: "PreTrainedTokenizerBase"
) -> list[Tokens]:
    """Return the token ids of each conversation, and whether the assistant has to learn each.

    Raises DataError where the tokenizer has no chat template, and naming every conversation that
    the template refuses.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"format 'chat' needs a chat template, and the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} has none",
            "use a model that was tuned on conversations, or write the rows as instruction and "
            "output",
        ) from error
    tokenize = _tokens_by_marks if _GENERATION.search(template) else _tokens_by_prefixes
    rows, bad_rows = [], BadRows()
    for example in examples:
        messages = [{"role": role, "content": content} for role, content in example.messages]
        try:
            rows.append(tokenize(messages, tokenizer))
        except BadRow as error:
            bad_rows.add(example.place, error)
    bad_rows.raise_if_any()
    return rows


def answer_ends(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that the chat template puts after an answer: one, or none at all."""
    probe = ChatExample("probe", (("user", "a"), ("assistant", "b")))
    try:
        ids, learned = chat_tokens([probe], tokenizer)[0]
    except DataError:  # no template, or one that asks for another kind of conversation
        return []
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    answer = [token for token, target in zip(ids, learned, strict=True) if target]
    return [token for token in answer if token in special][-1:]


def _tokens_by_marks(
    messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> Tokens:
    encoded = _apply(
        tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    learned = [bool(mark) for mark in encoded["assistant_masks"]]
    if not any(learned):
        raise BadRow("the chat template marks no token as the assistant's")
    return list(encoded["input_ids"]), learned


def _tokens_by_prefixes(
    messages: list[dict[str, str]], tokenizer: "PreTrainedTokenizerBase"
) -> Tokens:
    if not tokenizer.is_fast:
        raise DataError(
            f"format 'chat' needs a fast tokenizer, and {tokenizer.name_or_path} has none: only "
            "that tells which characters a token stands for"
        )
    text = _apply(tokenizer, messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(encoded["input_ids"])
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    learned = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:index], tokenize=False, add_generation_prompt=True)
        until = _apply(tokenizer, messages[: index + 1], tokenize=False)
        if not (text.startswith(until) and until.startswith(before)):
            raise BadRow(
                f"the chat template writes message {index} differently once other messages follow, "
                "so the tokens of the answer cannot be located"
            )
        answer = [
            position
            for position, (start, end) in enumerate(encoded["offset_mapping"])
            if end > len(before) and start < len(until)
        ]
        ends = [count for count, position in enumerate(answer, 1) if ids[position] in special]
        if ends:
            after_end = tokenizer.decode([ids[position] for position in answer[ends[-1] :]])
            if not str(after_end).strip():
                answer = answer[: ends[-1]]
        for position in answer:
            learned[position] = True
    return ids, learned


def _apply(tokenizer: "PreTrainedTokenizerBase", messages: list[Any], **options: Any) -> Any:
    """Apply the chat template; raises BadRow where it refuses the conversation."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        raise BadRow(f"the chat template refuses it: {first_line(error)}") from None
