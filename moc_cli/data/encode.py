"""Examples to tokens: cut to length, closed by the end token, labelled where the loss applies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moc_cli.data.custom.chat import chat_tokens
from moc_cli.data.examples import (
    ChatExample,
    ChoiceExample,
    InstructionExample,
    PairExample,
    TextExample,
    fingerprint,
)
from moc_cli.models.tokens import prompt_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that no loss counts
_CHUNK = 1000  # texts a call of the tokenizer
Row = dict[str, Any]
TextWithAnswer = ChoiceExample | InstructionExample | TextExample


@dataclass(frozen=True)
class Encoded:
    """Rows of tokens, in the order of their examples.

    A row of a language model holds `input_ids` and as many `labels`; a row of a classifier holds
    one label, and `token_type_ids` where its tokenizer makes them. `prompt_lengths` counts each
    row's tokens before its first answer (for a classifier: all; for a plain text: the first token,
    which nothing predicts). `truncated` rows were longer than max_length; of those,
    `answers_cut_off` lost all their answer.
    """

    rows: list[Row]
    prompt_lengths: list[int]
    truncated: int
    answers_cut_off: int
    fingerprint: str

    @property
    def ids(self) -> list[list[int]]:
        """The tokens of each row."""
        return [row["input_ids"] for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return list(map(len, self.ids))


def has_target(row: Row) -> bool:
    """Whether the loss counts any token of a row; a classifier's row always has its label."""
    labels = row["labels"]
    return not isinstance(labels, list) or any(label != IGNORED for label in labels)


def encode_texts(
    examples: Sequence[TextWithAnswer],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    train_on_inputs: bool = True,
) -> Encoded:
    """Encode questions, instructions or plain texts: at most `max_length` tokens each.

    The end token is appended where there is room. With `train_on_inputs` every token but the first
    is labelled, otherwise those from the answer on. A token that holds the blanks before an answer
    and the answer's first letters counts as answer.
    """
    rows, prompt_lengths = [], []
    truncated = answers_cut_off = 0
    end = tokenizer.eos_token_id
    for ids, start in _train_tokens(examples, tokenizer):
        if len(ids) > max_length:
            truncated += 1
            answers_cut_off += start >= max_length
            ids = ids[:max_length]
        elif len(ids) < max_length and end is not None and ids[-1] != end:
            ids = [*ids, end]
        start = min(start, len(ids))
        # Nothing comes before a row's first token that could predict it; padding on the left would.
        hidden = 1 if train_on_inputs else max(start, 1)
        labels = [IGNORED] * hidden + ids[hidden:]
        rows.append({"input_ids": ids, "labels": labels})
        prompt_lengths.append(max(start, 1))
    return Encoded(rows, prompt_lengths, truncated, answers_cut_off, fingerprint(examples))


def encode_chats(
    examples: Sequence[ChatExample],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    train_on_inputs: bool = True,
) -> Encoded:
    """Encode conversations, of at most `max_length` tokens each.

    Labelled are the assistant's turns, with `train_on_inputs` every token but the first. The chat
    template alone says how a turn ends.
    """
    rows, prompt_lengths = [], []
    truncated = answers_cut_off = 0
    for tokens, answers in chat_tokens(examples, tokenizer):
        ids, learned = tokens[:max_length], answers[:max_length]
        truncated += len(tokens) > max_length
        answers_cut_off += not any(learned[1:])
        first = learned.index(True) if any(learned) else len(ids)
        targets = [True] * len(ids) if train_on_inputs else learned
        labels = [token if target else IGNORED for token, target in zip(ids, targets, strict=True)]
        rows.append({"input_ids": ids, "labels": [IGNORED, *labels[1:]]})
        prompt_lengths.append(max(first, 1))
    return Encoded(rows, prompt_lengths, truncated, answers_cut_off, fingerprint(examples))


def encode_pairs(
    examples: Sequence[PairExample], tokenizer: "PreTrainedTokenizerBase", *, max_length: int
) -> Encoded:
    """Encode sentences or pairs; of a pair too long, the longer side gives way first."""
    rows: list[Row] = []
    truncated = 0
    names = ("input_ids", "token_type_ids")
    for example in examples:
        tokens = _tokens(tokenizer, example)
        if len(tokens["input_ids"]) > max_length:
            truncated += 1
            tokens = _tokens(tokenizer, example, truncation=True, max_length=max_length)
        row = {name: list(tokens[name]) for name in names if name in tokens}
        rows.append(row | {"labels": example.label})
    lengths = [len(row["input_ids"]) for row in rows]
    return Encoded(rows, lengths, truncated, 0, fingerprint(examples))


def prompt_tokens(tokenizer: "PreTrainedTokenizerBase", example: ChoiceExample) -> list[list[int]]:
    """Tokens of the evaluation prompt alone and then of the prompt with each candidate."""
    texts = [example.eval_prompt, *(example.eval_prompt + text for text in example.candidates)]
    return prompt_ids(tokenizer, texts)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all the sequences share."""
    shortest = min(len(sequence) for sequence in sequences)
    for place in range(shortest):
        if len({sequence[place] for sequence in sequences}) > 1:
            return place
    return shortest


def _train_tokens(
    examples: Sequence[TextWithAnswer], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[int], int]]:
    """Yield each training text's tokens and the place of the answer's first one."""
    for first in range(0, len(examples), _CHUNK):
        chunk = examples[first : first + _CHUNK]
        texts = [example.train_text for example in chunk]
        if tokenizer.is_fast:
            batch = tokenizer(texts, return_offsets_mapping=True, verbose=False)
            marks = zip(chunk, batch["input_ids"], batch["offset_mapping"], strict=True)
            for example, ids, offsets in marks:
                # The answer's first token ends after its first character; special tokens end at 0.
                beyond = (n for n, (_, end) in enumerate(offsets) if end > example.answer_start)
                yield list(ids), next(beyond, len(offsets))
        else:
            prompts = [example.train_text[: example.answer_start] for example in chunk]
            tokens = tokenizer(texts, verbose=False)["input_ids"]
            prompt_tokens = tokenizer(prompts, verbose=False)["input_ids"]
            for ids, prompt in zip(tokens, prompt_tokens, strict=True):
                yield list(ids), common_prefix([ids, prompt])


def _tokens(
    tokenizer: "PreTrainedTokenizerBase", example: PairExample, **options: Any
) -> dict[str, Any]:
    return dict(tokenizer(example.text_a, example.text_b, verbose=False, **options))
