"""Generated answers: where they end, and those in which no option is found."""

from types import SimpleNamespace

import pytest
from support.models import make_byte_tokenizer, make_tiny

from moc_cli.data.commonsense import make_example
from moc_cli.kinds.choice import Choice
from moc_cli.methods import TextModel
from moc_cli.models.tokens import end_tokens
from moc_cli.scoring.generate import settings
from moc_cli.scoring.results import ScoringOptions


def test_an_answer_without_an_option_is_wrong_and_counted_apart(monkeypatch):
    words = ["answer1", "answer2", "answer3"]
    examples = [make_example("ARC-Easy", "which one?", words, 0)] * 4
    texts = ["nothing", "answer1", "answer2", "answer5"]
    monkeypatch.setattr("moc_cli.scoring.generate.run_batches", lambda *_, **__: texts)
    model = TextModel(SimpleNamespace(model=make_tiny("llama")), make_byte_tokenizer())
    evaluation = Choice().score(model, examples, ScoringOptions(2, 400, "generate"))
    assert [item.prediction for item in evaluation.items] == [None, 0, 1, None]
    assert [item.correct for item in evaluation.items] == [False, True, False, False]
    assert evaluation.main.value == pytest.approx(1 / 4)
    assert evaluation.unparsed == 1


def test_an_answer_ends_at_the_models_end_tokens_and_at_that_of_training():
    model, tokenizer = make_tiny("llama"), make_byte_tokenizer()
    model.generation_config.eos_token_id = 9
    ends = sorted({9, tokenizer.eos_token_id})
    assert len(ends) == 2
    assert end_tokens(model, tokenizer) == ends
    with settings(model, tokenizer):
        assert model.generation_config.eos_token_id == ends
