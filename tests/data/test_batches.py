"""Rows of tokens: where they are cut, closed and labelled, how they are batched and padded."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moc_cli.data.batches import Batches, Grouping, collate
from moc_cli.data.commonsense import make_example
from moc_cli.data.encode import IGNORED, Encoded, common_prefix, encode_pairs, encode_texts
from moc_cli.data.examples import ChoiceExample, PairExample
from moc_cli.data.suites import load_examples
from moc_cli.kinds.pairs import Pairs
from moc_cli.kinds.writing import PlainText

EOS = 2


def question(text: str = "Is it?", label: int = 0) -> ChoiceExample:
    """A question of two options."""
    return make_example("boolq", text, ["true", "false"], label)


def encode(
    examples: list[ChoiceExample],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int = 512,
    train_on_inputs: bool = True,
) -> Encoded:
    """Shorthand."""
    return encode_texts(examples, tokenizer, max_length=max_length, train_on_inputs=train_on_inputs)


class SlowTokenizer:
    """A tokenizer that gives no offsets, as those written in Python."""

    is_fast = False
    eos_token_id = EOS

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: list[str], **options: object) -> dict:
        return self._tokenizer(texts)


# Questions


def test_whole_row_is_the_text_and_the_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """Its first token has nothing before it but padding, if that, and is no target."""
    example = question()
    (row,) = encode([example], byte_tokenizer).rows
    assert row["input_ids"][-1] == EOS
    assert byte_tokenizer.decode(row["input_ids"][:-1]) == example.train_text
    assert row["labels"] == [IGNORED, *row["input_ids"][1:]]


def test_masked_prompt_leaves_the_answer(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """The last blank merges with the answer's first letter; that token belongs to the answer."""
    encoded = encode([question()], byte_tokenizer, train_on_inputs=False)
    (row,), (start,) = encoded.rows, encoded.prompt_lengths
    kept = [label for label in row["labels"] if label != IGNORED]
    assert byte_tokenizer.decode(kept[:-1]) == " the correct answer is true"
    assert kept[-1] == EOS
    assert row["labels"] == [IGNORED] * start + row["input_ids"][start:]


@pytest.mark.parametrize("train_on_inputs", [True, False])
def test_tokenizer_without_offsets_masks_alike(
    byte_tokenizer: PreTrainedTokenizerFast, train_on_inputs: bool
) -> None:
    """By common prefix, the blanks before the answer, split otherwise there, are answer too."""
    slow = encode([question()], SlowTokenizer(byte_tokenizer), 512, train_on_inputs)  # type: ignore[arg-type]
    fast = encode([question()], byte_tokenizer, 512, train_on_inputs)
    assert slow.rows[0]["input_ids"] == fast.rows[0]["input_ids"]
    (begin,), (start,) = slow.prompt_lengths, fast.prompt_lengths
    assert begin <= start
    between = fast.rows[0]["input_ids"][begin:start]
    assert byte_tokenizer.decode(between).strip() == ""
    if not train_on_inputs:
        assert slow.rows[0]["labels"][start:] == fast.rows[0]["labels"][start:]


def test_special_tokens_of_the_tokenizer_stay(pair_tokenizer: PreTrainedTokenizerFast) -> None:
    """A tokenizer that begins and ends texts by itself: its begin is prompt, its end is answer."""
    pair_tokenizer = with_end(pair_tokenizer, eos="</s>")
    (row,) = encode([question()], pair_tokenizer, train_on_inputs=False).rows
    assert row["input_ids"][0] == 1
    assert row["input_ids"][-1] == EOS
    assert row["input_ids"].count(EOS) == 1
    assert row["labels"][0] == IGNORED
    assert row["labels"][-1] == EOS


def with_end(tokenizer: PreTrainedTokenizerFast, eos: str) -> PreTrainedTokenizerFast:
    """The same tokenizer with an end token."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=eos)


@pytest.mark.parametrize("less", [0, 1, 2, 10, 40])
def test_rows_are_cut_and_counted(byte_tokenizer: PreTrainedTokenizerFast, less: int) -> None:
    """The end token needs room of its own; a row that loses its answer is counted apart."""
    tokens = byte_tokenizer(question().train_text)["input_ids"]
    whole = len(tokens)
    encoded = encode([question()], byte_tokenizer, whole - less, train_on_inputs=False)
    (row,) = encoded.rows
    assert row["input_ids"] == tokens[: whole - less]
    assert len(row["labels"]) == whole - less
    assert row["input_ids"][-1] != EOS
    assert encoded.truncated == (less > 0)
    assert encoded.answers_cut_off == (less == 40)
    assert (set(row["labels"]) == {IGNORED}) == (less == 40)
    assert encoded.prompt_lengths[0] <= whole - less


def test_answer_is_lost_when_its_first_token_is(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    (start,) = encode([question()], byte_tokenizer).prompt_lengths
    for max_length, lost in ((start + 1, 0), (start, 1), (start - 1, 1)):
        cut = encode([question()], byte_tokenizer, max_length, train_on_inputs=False)
        assert cut.answers_cut_off == lost
        assert sum(label != IGNORED for label in cut.rows[0]["labels"]) == 1 - lost


def test_token_that_ends_where_the_answer_begins_is_prompt(
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    example = ChoiceExample("boolq", "ab cd", 3, "ab ", ("cd", "ef"), 0)
    encoded = encode([example], byte_tokenizer, train_on_inputs=False)
    assert encoded.prompt_lengths == [3]
    assert byte_tokenizer.decode(encoded.rows[0]["labels"][3:]) == "cd</s>"


def test_one_token_of_room_is_for_the_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = len(byte_tokenizer(question().train_text)["input_ids"])
    (row,) = encode([question()], byte_tokenizer, whole + 1).rows
    assert len(row["input_ids"]) == whole + 1
    assert row["input_ids"][-1] == EOS


def test_many_rows_keep_their_order(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [question(f"Is {number} odd?", number % 2) for number in range(1203)]
    encoded = encode(examples, byte_tokenizer)
    for number in (0, 999, 1000, 1202):
        text = byte_tokenizer.decode(encoded.rows[number]["input_ids"][:-1])
        assert text == examples[number].train_text
    assert encoded.fingerprint != encode(examples[::-1], byte_tokenizer).fingerprint
    assert encoded.lengths == [len(row["input_ids"]) for row in encoded.rows]


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2]]) == 2
    assert common_prefix([[1, 2, 3], [1, 4, 3]]) == 1
    assert common_prefix([[1], []]) == 0


# Pairs


def test_pairs_are_typed_labelled_and_cut(pair_tokenizer: PreTrainedTokenizerFast) -> None:
    pairs = [PairExample("mrpc", "abc", "de", 1), PairExample("mrpc", "abcdefghijklmnop", "yz", 0)]
    encoded = encode_pairs(pairs, pair_tokenizer, max_length=10)
    short, cut = encoded.rows
    assert short["token_type_ids"] == [0] * 5 + [1] * 3
    assert short["labels"] == 1
    assert encoded.lengths == [8, 10]
    assert pair_tokenizer.decode(cut["input_ids"]) == "<s>abcde</s>yz</s>"
    assert (encoded.truncated, encoded.answers_cut_off) == (1, 0)
    single = encode_pairs([PairExample("cola", "abc", None, 0)], pair_tokenizer, max_length=10)
    assert single.lengths == [5]


# Batches


LENGTHS = [5 + number * 7919 % 246 for number in range(1003)]


@pytest.mark.parametrize("grouped", [True, False, "even"])
@pytest.mark.parametrize("size", [1, 7, 16, 1003, 2000])
def test_every_row_is_in_one_batch(size: int, grouped: Grouping) -> None:
    plan = Batches(LENGTHS, size, seed=1, group_by_length=grouped).epoch(3)
    assert sorted(row for batch in plan for row in batch) == list(range(len(LENGTHS)))
    assert all(len(batch) == size for batch in plan[:-1])
    assert len(plan[-1]) == (len(LENGTHS) % size or size)


@pytest.mark.parametrize("grouped", [True, False, "even"])
def test_epochs_are_pure_functions_of_seed_and_number(grouped: Grouping) -> None:
    def plan(seed: int, epoch: int) -> list[list[int]]:
        return Batches(LENGTHS, 16, seed=seed, group_by_length=grouped).epoch(epoch)

    before, torch_before = random.getstate(), torch.get_rng_state()
    again = Batches(LENGTHS, 16, seed=1, group_by_length=grouped)
    later = again.epoch(5)
    assert again.epoch(0) == plan(1, 0)
    assert later == plan(1, 5)
    assert len({str(plan(seed, epoch)) for seed in (1, 2) for epoch in (0, 1, 2)}) == 6
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_grouping_saves_padding() -> None:
    grouped = Batches(LENGTHS, 16, seed=1, group_by_length=True).padding_share()
    mixed = Batches(LENGTHS, 16, seed=1, group_by_length=False).padding_share()
    assert grouped < 0.1 < 0.3 < mixed


def test_even_batches_have_nearly_as_many_tokens() -> None:
    """Each pool's rows are dealt out: the largest batch is little larger than the mean one."""
    even, mixed = (
        [
            sum(LENGTHS[row] for row in batch)
            for batch in Batches(LENGTHS, 16, seed=1, group_by_length=grouping).epoch(0)[:-1]
        ]
        for grouping in ("even", False)
    )
    mean = sum(even) / len(even)
    assert max(even) < 1.1 * mean < max(mixed)
    odd = Batches(LENGTHS, 3, seed=1, group_by_length="even").epoch(0)
    assert sorted(row for batch in odd for row in batch) == list(range(len(LENGTHS)))
    assert {len(batch) for batch in odd[:-1]} == {3}


def test_grouped_batches_come_in_no_order_of_length() -> None:
    plan = Batches(LENGTHS, 16, seed=1, group_by_length=True).epoch(0)[:-1]
    longest = [max(LENGTHS[row] for row in batch) for batch in plan]
    rises = sum(b > a for a, b in zip(longest, longest[1:], strict=False))
    assert 0.3 < rises / len(longest) < 0.7


def test_rows_of_every_length_fall_into_the_short_batch() -> None:
    batches = Batches(LENGTHS, 16, seed=1, group_by_length=True)
    last = [LENGTHS[row] for epoch in range(60) for row in batches.epoch(epoch)[-1]]
    mean, rest = sum(last) / len(last), sum(LENGTHS) / len(LENGTHS)
    assert abs(mean - rest) < 0.1 * rest


def test_padding_share_counts_slots() -> None:
    assert Batches([4, 4, 4, 4], 2, seed=0).padding_share() == 0
    assert Batches([1, 4], 2, seed=0).padding_share() == pytest.approx(3 / 8)
    assert Batches([], 2, seed=0).padding_share() == 0
    assert Batches([], 2, seed=0).epoch(0) == []


# Tensors


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_on_its_side(byte_tokenizer: PreTrainedTokenizerFast, side: str) -> None:
    rows = [{"input_ids": [7, 8, 9], "labels": [IGNORED, 8, 9]}, {"input_ids": [5], "labels": [5]}]
    state = dict(vars(byte_tokenizer))
    batch = collate(rows, byte_tokenizer, side=side)  # type: ignore[arg-type]
    short = {"left": [0, 0, 5], "right": [5, 0, 0]}[side]
    assert batch["input_ids"].tolist() == [[7, 8, 9], short]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [int(token > 0) for token in short]]
    hidden = [token or IGNORED for token in short]
    assert batch["labels"].tolist() == [[IGNORED, 8, 9], hidden]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert dict(vars(byte_tokenizer)) == state
    assert rows[1] == {"input_ids": [5], "labels": [5]}


def test_training_pads_language_models_before_and_classifiers_behind(
    byte_tokenizer: PreTrainedTokenizerFast, pair_tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = [[5, 6, 7], [8]]
    texts = [{"input_ids": row, "labels": row} for row in ids]
    batch = PlainText().collate(texts, byte_tokenizer)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[5, 6, 7], [IGNORED, IGNORED, 8]]
    pairs = [{"input_ids": row, "labels": 1} for row in ids]
    batch = Pairs(("accuracy",), 2, ("no", "yes")).collate(pairs, pair_tokenizer)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_collate_without_a_pad_token_uses_the_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """The end token that is text keeps its label and its place in the mask."""
    bare = with_end(byte_tokenizer, eos="</s>")
    assert bare.pad_token_id is None
    rows = [{"input_ids": [7, EOS], "labels": [7, EOS]}, {"input_ids": [EOS], "labels": [EOS]}]
    batch = collate(rows, bare, side="left")
    assert batch["input_ids"].tolist() == [[7, EOS], [EOS, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]
    assert batch["labels"].tolist() == [[7, EOS], [IGNORED, EOS]]


def test_collate_gives_classes_and_scores_their_types(
    pair_tokenizer: PreTrainedTokenizerFast,
) -> None:
    def labels(*values: float) -> torch.Tensor:
        pairs = [PairExample("t", "a" * (number + 1), "b", v) for number, v in enumerate(values)]
        rows = encode_pairs(pairs, pair_tokenizer, max_length=50).rows
        batch = Pairs((), 2).collate(rows, pair_tokenizer)
        assert batch["token_type_ids"].shape == batch["input_ids"].shape
        assert batch["input_ids"][0, -1] == pair_tokenizer.pad_token_id
        return batch["labels"]

    assert labels(1, 0).dtype == torch.long
    assert labels(1.0, 0.5).dtype == torch.float32


# Real rows


@pytest.mark.real
def test_real_rows_and_tokenizer(real_data: Path, real_weights: Callable[[str], Path]) -> None:
    """Padding on OpenBookQA falls from a fifth to a fiftieth of the slots."""
    tokenizer = AutoTokenizer.from_pretrained(real_weights("smollm2-135m"))
    examples = load_examples("commonsense", "openbookqa", "train", path=real_data / "commonsense")
    encoded = encode(examples, tokenizer, 256, train_on_inputs=False)
    assert (encoded.truncated, encoded.answers_cut_off) == (0, 0)
    for example, row in zip(examples[:50], encoded.rows, strict=False):
        kept = [label for label in row["labels"] if label != IGNORED]
        assert tokenizer.decode(kept) == " " + example.candidates[example.label] + "<|im_end|>"
    assert Batches(encoded.lengths, 16, seed=0).padding_share() < 0.025
    assert Batches(encoded.lengths, 16, seed=0, group_by_length=False).padding_share() > 0.15
