"""Batches that fit: the first size is an estimate, and what does not fit is halved and told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.messages import refused
from support.models import make_tiny_model
from support.questions import MIXED, PAIRS, adapted
from support.short_memory import FULL, room_for
from tokenizers import Tokenizer as Words
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast as Tokenizer

from moc_cli.data.encode import encode_texts
from moc_cli.errors import MocError
from moc_cli.kinds import Choice
from moc_cli.methods import TextModel, bare
from moc_cli.scoring import batch_size as sizing
from moc_cli.scoring.batch_size import BatchSize, RowCost, free_bytes, row_bytes, run_batches
from moc_cli.scoring.classify import classify
from moc_cli.scoring.generate import generate, write
from moc_cli.scoring.likelihood import Query
from moc_cli.scoring.loss import lm_loss
from moc_cli.scoring.rank import query_of, rank
from moc_cli.scoring.results import ScoringOptions


@pytest.mark.parametrize("kind", FULL)
def test_what_does_not_fit_is_halved_and_told(
    byte_tokenizer: Tokenizer, capsys: pytest.CaptureFixture, kind: str
) -> None:
    """Ranking may need a row for each candidate; the results are those of small batches."""
    found = adapted(make_tiny_model("llama"))
    expected = rank(TextModel(found, byte_tokenizer), MIXED, batch_size=1)
    size = BatchSize(13)
    seen: list[tuple[int, int]] = []
    with room_for(found.model, 7, FULL[kind]):
        items = rank(
            TextModel(found, byte_tokenizer),
            MIXED,
            batch_size=size,
            on_progress=lambda *done: seen.append(done),
        )
    assert [item.prediction for item in items] == [item.prediction for item in expected]
    for one, other in zip(items, expected, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=2e-4)
    assert (size.used, size.halved) == (1, 3)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(" of up to ")[0] for line in told] == ["13 rows", "6 rows", "3 rows"]
    assert told[0].endswith("tokens do not fit in memory: going on with 6")
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (13, 13)


def test_generation_is_halved_too(byte_tokenizer: Tokenizer) -> None:
    """Four beams a row: eight rows of the cache hold two questions."""
    found = adapted(make_tiny_model("llama"))
    expected = generate(TextModel(found, byte_tokenizer), MIXED[:5], batch_size=1)
    size = BatchSize(4)
    with room_for(found.model, 8) as tried:
        assert generate(TextModel(found, byte_tokenizer), MIXED[:5], batch_size=size) == expected
    assert (size.used, size.halved) == (2, 1)
    assert max(tried[tried.index(16) + 1 :]) == 8


def test_losses_and_classes_are_halved_too(
    byte_tokenizer: Tokenizer, pair_tokenizer: Tokenizer
) -> None:
    found = adapted(make_tiny_model("llama"))
    encoded = encode_texts(MIXED, byte_tokenizer, max_length=500)
    expected = lm_loss(TextModel(found, byte_tokenizer), encoded, batch_size=1)
    with room_for(found.model, 3):
        loss = lm_loss(TextModel(found, byte_tokenizer), encoded, batch_size=13)
    assert loss.tokens == expected.tokens
    assert loss.loss == pytest.approx(expected.loss, abs=1e-5)
    classifier = adapted(make_tiny_model("bert", num_labels=2, type_vocab_size=2))
    model = TextModel(classifier, pair_tokenizer)
    alone = classify(model, PAIRS, batch_size=1, max_length=64)
    with room_for(classifier.model, 5):
        halved = classify(
            TextModel(classifier, pair_tokenizer), PAIRS, batch_size=23, max_length=64
        )
    for one, other in zip(alone, halved, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)


def test_what_did_not_fit_is_not_counted(byte_tokenizer: Tokenizer) -> None:
    """The first layer's sites had decided when memory ran out in the second one."""
    found = adapted(make_tiny_model("llama"))
    counts = []
    for rows in (99, 3):
        with room_for(found.model, rows), found.recorder(detailed=False) as recorder:
            rank(TextModel(found, byte_tokenizer), MIXED, batch_size=8)
        counts.append(recorder.record().choices())
    assert counts[0] == counts[1]


def test_a_row_that_never_fits_is_a_sentence(byte_tokenizer: Tokenizer) -> None:
    found = bare(make_tiny_model("llama"))
    with (
        room_for(found.model, 0),
        refused(MocError),
    ):
        rank(TextModel(found, byte_tokenizer), MIXED, batch_size=2)


def test_other_errors_pass_through(byte_tokenizer: Tokenizer) -> None:
    found = bare(make_tiny_model("llama"))
    other = RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")
    with room_for(found.model, 0, lambda: other), pytest.raises(RuntimeError, match="must match"):
        rank(TextModel(found, byte_tokenizer), MIXED, batch_size=2)


def test_the_failed_batch_is_let_go() -> None:
    """A batch's tensors are gone before the next one is tried: the error holds none of them."""
    model = bare(make_tiny_model("llama"))
    alive: list[object] = []

    class Tensors:
        def __del__(self) -> None:
            alive.remove(self.name)

        def __init__(self, name: int) -> None:
            self.name = name
            alive.append(name)

    def work(items: list[int]) -> list[int]:
        held = Tensors(len(items))
        assert alive == [held.name]
        if len(items) > 2:
            raise torch.OutOfMemoryError("full")
        return items

    assert run_batches(model, [RowCost(3)] * 9, work, size=9) == list(range(9))


# The estimate


@pytest.mark.parametrize(("rows", "expected"), [(0.5, 1), (1, 1), (5.2, 5), (12.5, 12), (999, 16)])
def test_auto_is_what_half_of_the_free_memory_holds(
    monkeypatch: pytest.MonkeyPatch, byte_tokenizer: Tokenizer, rows: float, expected: int
) -> None:
    found = bare(make_tiny_model("llama"))
    longest = longest_of(questions(byte_tokenizer))
    need = row_bytes(found.model, longest)
    monkeypatch.setattr(sizing, "free_bytes", lambda device: int(2 * rows * need) + 1)
    size = BatchSize("auto")
    rank(TextModel(found, byte_tokenizer), MIXED, batch_size=size)
    assert size == BatchSize("auto", expected, 0)


def questions(tokenizer: Tokenizer):
    return [query_of(tokenizer, example) for example in MIXED]


def longest_of(asked: list[Query]) -> RowCost:
    """What the longest question takes, of which no logits are kept."""
    return replace(max((query.cost for query in asked), key=lambda cost: cost.tokens), logits=0)


def test_a_row_is_counted_from_the_models_shape() -> None:
    """Cache: keys and values of 2 layers, 2 groups of 8, for 10 tokens, and for 3 x 14."""
    model = make_tiny_model("llama")
    once = row_bytes(model, RowCost(10))
    assert row_bytes(model, RowCost(10, new=4, copies=3)) - row_bytes(
        model, RowCost(10, copies=3)
    ) == (2 * 2 * 2 * 8 * 4 * 3 * 4)
    assert row_bytes(model, RowCost(20)) > 2 * once - 3 * model.config.vocab_size * 4
    assert row_bytes(model.to(torch.bfloat16), RowCost(10)) < once
    logits = row_bytes(model, RowCost(10, logits=5)) - row_bytes(model, RowCost(10))
    assert logits == 4 * 3 * model.config.vocab_size * 4
    cache = row_bytes(model, RowCost(10)) - row_bytes(model, RowCost(10, copies=0))
    assert cache == 2 * 2 * 2 * 8 * 2 * 20  # bfloat16 by now: what the forward fills, and one copy


def test_the_estimate_covers_what_ranking_really_takes(byte_tokenizer: Tokenizer) -> None:
    """All that lives at once in a batch, beyond the weights, counted by torch on the CPU."""
    model = make_tiny_model(
        "llama", hidden_size=64, intermediate_size=192, num_hidden_layers=6, head_dim=16
    )
    found = adapted(model)
    asked = questions(byte_tokenizer)
    longest = longest_of(asked)
    with torch.profiler.profile(profile_memory=True) as profile:
        rank(TextModel(found, byte_tokenizer), MIXED, batch_size=13)
    level = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            level += event.nbytes()
            peak = max(peak, level)
    assert 0 < peak < 2 * 13 * row_bytes(model, longest)


def test_free_memory_is_what_the_system_says() -> None:
    free = free_bytes(torch.device("cpu"))
    assert 2**20 < free < 2**50


def test_results_tell_size_and_halving(byte_tokenizer: Tokenizer) -> None:
    found = bare(make_tiny_model("llama"))
    same = [example for example in MIXED if example.candidates == MIXED[0].candidates]
    with room_for(found.model, 6):
        evaluation = Choice().score(TextModel(found, byte_tokenizer), same, ScoringOptions(8))
    assert evaluation.batch == BatchSize(8, 2, 2)
    assert evaluation.main.n == len(same)


def test_what_fills_a_row_that_has_ended_is_no_text() -> None:
    """Of a tokenizer without pad and end token, whose token 0 is a word like any other."""
    words = Words(WordLevel({f"w{number}": number for number in range(256)}, unk_token="w1"))
    words.pre_tokenizer = Whitespace()
    tokenizer = Tokenizer(tokenizer_object=words)
    model = TextModel(bare(make_tiny_model("llama")), tokenizer)
    prompts = [[5, 6, 7], [9, 8, 7, 6], [30, 31]]
    (text,) = write(model, prompts[:1], [12], batch_size=1)
    config: Any = model.adapted.model.generation_config
    config.eos_token_id = int(text.split()[3].removeprefix("w"))
    alone = [write(model, [prompt], [12], batch_size=1)[0] for prompt in prompts]
    assert len(alone[0].split()) < 5
    assert write(model, prompts, [12] * 3, batch_size=3) == alone
