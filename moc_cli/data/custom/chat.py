"""The tokens of conversations by the tokenizer's chat template, and which of them are learned.

Learned are the assistant's messages and the token that ends each. A template may mark them itself
({% generation %}). Otherwise the tokens of message i are what the conversation up to it has more
than the conversation before it with the assistant's header; both must be a prefix of the complete
conversation. White space that a template writes after the end token belongs to the next message.
Where a template rewrites earlier answers (as Qwen3's does), only the last one is learned. An answer
of which a template writes nothing (tool calls in ChatML) is not learned.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moc_cli.data.custom.messages import Turn, turns_of
from moc_cli.data.examples import ChatExample
from moc_cli.data.source import BadRow, BadRows
from moc_cli.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HINT = (
    "data.merge_system: true writes system messages into the first user message, "
    "data.chat_turns: last leaves out what follows the last answer, and data.chat_template takes "
    "another template"
)
Tokens = tuple[list[int], list[bool]]  # the ids, and whether each is learned


def read_template(template: str) -> str:
    """Return the chat template that a recipe gives: `chatml`, a file, or what it says itself.

    Raises DataError for a file that cannot be read.
    """
    if template == "chatml":
        return CHATML
    if "{" in template:
        return template
    path = Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig") if path.is_file() else template
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.chat_template: {path} cannot be read: {error}") from error


def set_template(tokenizer: "PreTrainedTokenizerBase", template: str | None) -> None:
    """Give a tokenizer the chat template of a recipe: a text, or the name of one of its own.

    Raises DataError where it is neither.
    """
    if template is None:
        return
    text, tokenizer_template = read_template(template), tokenizer.chat_template
    if "{" not in text:
        if not isinstance(tokenizer_template, dict) or text not in tokenizer_template:
            names = ", ".join(
                ["chatml", *(tokenizer_template if isinstance(tokenizer_template, dict) else ())]
            )
            raise DataError(
                f"data.chat_template: no file {template}, and no template of this name",
                f"give a file or one of: {names}",
            )
        text = tokenizer_template[text]
    tokenizer.chat_template = text


def chat_tokens(
    examples: Sequence[ChatExample], tokenizer: "PreTrainedTokenizerBase"
) -> list[Tokens]:
    """Return the token ids of each conversation, and whether the assistant has to learn each.

    Raises DataError where the tokenizer has no chat template, and naming every conversation that
    the template refuses.
    """
    return [tokens for _, tokens in _written(examples, tokenizer)]


def check_chats(examples: Sequence[ChatExample], tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """Say what the chat template does not write, and how many conversations it rewrites.

    Raises DataError as `chat_tokens` does.
    """
    template = _template(tokenizer)
    marked = _GENERATION.search(template) is not None
    keys: dict[str, None] = {}
    rewritten = unwritten_answers = 0
    for conversation, _ in _written(dict.fromkeys(examples), tokenizer):
        keys |= dict.fromkeys(key for turn in conversation.turns for key in turn)
        keys |= {"tools": None} if conversation.tools else {}
        unwritten_answers += len(conversation.unwritten)
        rewritten += not marked and None in conversation.spans
    unwritten = [key for key in keys if key not in template]
    notes = []
    if unwritten:
        notes.append(f"the chat template does not write: {', '.join(unwritten)}")
    if unwritten_answers:
        notes.append(
            f"{unwritten_answers:,} answers are not learned: the chat template writes nothing of "
            "them"
        )
    if rewritten:
        notes.append(
            f"the chat template rewrites earlier answers of {rewritten:,} conversations: only "
            "their last answer is learned; data.chat_turns: split learns each, in a row of its own"
        )
    return notes


def _written(
    examples: Iterable[ChatExample], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple["Conversation", Tokens]]:
    """Yield conversations with their tokens; at the end raise DataError naming the refused ones."""
    marked = _GENERATION.search(_template(tokenizer)) is not None
    bad_rows = BadRows()
    for example in examples:
        try:
            conversation = Conversation(example, tokenizer)
            by_marks = marked and not example.unlearned and not conversation.unwritten
            tokens = conversation.by_marks() if by_marks else conversation.by_prefixes()
        except BadRow as error:
            bad_rows.add(example.place, error)
        else:
            yield conversation, tokens
    bad_rows.raise_if_any(_HINT)


def answer_ends(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that the chat template puts after an answer: one, or none at all."""
    probe = ChatExample("probe", (("user", "a"), ("assistant", "b")))
    try:
        ids, learned = chat_tokens([probe], tokenizer)[0]
    except DataError:  # no template, or one that asks for another kind of conversation
        return []
    special = _special_tokens(tokenizer)
    answer = [token for token, target in zip(ids, learned, strict=True) if target]
    return [token for token in answer if token in special][-1:]


def apply_template(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Any], **options: Any
) -> Any:
    """Apply the chat template; raises BadRow where it refuses the conversation."""
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    # A template is a program of its author: it raises whatever it likes.
    except Exception as error:
        raise BadRow(f"the chat template refuses it: {first_line(error)}") from None


class Conversation:
    """A conversation as a chat template writes it; raises BadRow where the template refuses it."""

    def __init__(self, example: ChatExample, tokenizer: "PreTrainedTokenizerBase") -> None:
        self.turns, self.tools = turns_of(example)
        self.tokenizer = tokenizer
        answers = [
            index
            for index, turn in enumerate(self.turns)
            if turn["role"] == "assistant" and index not in example.unlearned
        ]
        self.text = self._write(self.turns)
        self.unwritten = [index for index in answers if self._is_unwritten(index)]
        self.learned = [index for index in answers if index not in self.unwritten]
        if not self.learned:
            raise BadRow("the chat template writes nothing of the answer to be learned")
        for turn in self.turns:
            if turn["role"] in ("system", "developer") and turn["content"].strip() not in self.text:
                raise BadRow(f"the chat template leaves out the {turn['role']} message")

    def by_marks(self) -> Tokens:
        """Return the tokens, learned where the template marks them."""
        encoded = self._apply(
            self.turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        learned = [bool(mark) for mark in encoded["assistant_masks"]]
        if not any(learned):
            raise BadRow("the chat template marks no token as the assistant's")
        return list(encoded["input_ids"]), learned

    def by_prefixes(self) -> Tokens:
        """Return the tokens, learned where the text grows by an answer."""
        tokenizer = self.tokenizer
        if not tokenizer.is_fast:
            raise DataError(
                f"format 'chat' needs a fast tokenizer, and {tokenizer.name_or_path} has none: "
                "only that tells which characters a token stands for"
            )
        encoded = tokenizer(
            self.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids = list(encoded["input_ids"])
        special = _special_tokens(tokenizer)
        learned = [False] * len(ids)
        for first, last in self._learned_spans():
            answer = [
                position
                for position, (start, end) in enumerate(encoded["offset_mapping"])
                if end > first and start < last
            ]
            ends = [count for count, position in enumerate(answer, 1) if ids[position] in special]
            if ends:
                after_end = tokenizer.decode([ids[position] for position in answer[ends[-1] :]])
                if not str(after_end).strip():
                    answer = answer[: ends[-1]]
            for position in answer:
                learned[position] = True
        return ids, learned

    @cached_property
    def spans(self) -> list[tuple[int, int] | None]:
        """The characters of each learned answer; None where the template writes it differently once
        other messages follow.
        """
        return [self._span(index) for index in self.learned]

    def _is_unwritten(self, index: int) -> bool:
        """Return whether the template writes an answer as if there were none, as of tool calls."""
        turn = self.turns[index]
        if turn["content"].strip():
            return False
        empty = {"role": turn["role"], "content": ""}
        earlier_turns = self.turns[:index]
        return self._write([*earlier_turns, turn]) == self._write([*earlier_turns, empty])

    def _learned_spans(self) -> list[tuple[int, int]]:
        """Return the characters of each answer; of the last alone where others are rewritten."""
        last = self.spans[-1]
        if last is None:
            raise BadRow(
                f"the chat template writes message {self.learned[-1]} differently once other "
                "messages follow, so the tokens of the answer cannot be located"
            )
        located = [span for span in self.spans if span is not None]
        return located if len(located) == len(self.spans) else [last]

    def _span(self, index: int) -> tuple[int, int] | None:
        until = self._write(self.turns[: index + 1])
        if index:
            prefix = self._write(self.turns[:index], add_generation_prompt=True)
        else:  # no template takes an empty conversation: its header is what two answers share
            variants = [turn | {"content": text} for turn in self.turns[:1] for text in ("a", "b")]
            prefix = os.path.commonprefix([self._write([variant]) for variant in variants])
        if self.text.startswith(until) and until.startswith(prefix):
            return len(prefix), len(until)
        return None

    def _write(self, turns: Sequence[Turn], **options: Any) -> str:
        return str(self._apply(turns, tokenize=False, **options))

    def _apply(self, turns: Sequence[Turn], **options: Any) -> Any:
        return apply_template(self.tokenizer, turns, tools=self.tools, **options)


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    return set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)


def _template(tokenizer: "PreTrainedTokenizerBase") -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(
            f"these rows need a chat template, and the tokenizer of "
            f"{tokenizer.name_or_path or 'this model'} has none",
            "use a model that was tuned on conversations, give one (data.chat_template: a file, or "
            "chatml), or write the rows as instruction and output with data.template: alpaca",
        ) from error
