"""Scoring: every score equals a plain forward's, and no row, batch or answer changes another."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.messages import refused
from support.questions import MIXED, PAIRS, adapted, question
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from moc_cli.data.encode import IGNORED, encode_pairs, encode_texts, prompt_tokens
from moc_cli.data.examples import ChoiceExample, PairExample
from moc_cli.data.suites import load_examples
from moc_cli.errors import DataError, MocError
from moc_cli.kinds import Choice, Pairs
from moc_cli.methods import TextModel, bare
from moc_cli.scoring.classify import PairScore, classify, pair_loss
from moc_cli.scoring.loss import lm_loss
from moc_cli.scoring.metrics import Score
from moc_cli.scoring.rank import ItemScore, rank
from moc_cli.scoring.results import Evaluation, ScoringOptions, average

MakeModel = Callable[..., PreTrainedModel]
CLOSE = 2e-4  # float32 sums of log-probabilities, in different orders of the same products


def by_full_forward(found, tokenizer: Tokenizer, example: ChoiceExample) -> list[float]:
    """Score each candidate alone, on its whole text, without cache or padding; the prompt votes."""
    alone, *joint = prompt_tokens(tokenizer, example)
    prompt = 0
    while all(ids[: prompt + 1] == alone[: prompt + 1] for ids in joint) and prompt < len(alone):
        prompt += 1
    scores = []
    for ids in joint:
        voters = torch.zeros(1, len(ids), dtype=torch.long)
        voters[:, :prompt] = 1
        with torch.no_grad(), found.voting(voters):
            logits = found.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        log_probs = logits.log_softmax(-1)
        places = range(prompt, len(ids))
        scores.append(sum(log_probs[place - 1, ids[place]].item() for place in places))
    return scores


ROUTINGS = {"frozen": {}, "running": {"decode": "running"}, "token": {"level": "token"}}


@pytest.fixture(params=["bare", *ROUTINGS])
def found(request: pytest.FixtureRequest, tiny_model: MakeModel):
    """A bare model, and one adapted in each way of routing while scoring."""
    model = tiny_model("llama")
    return (
        bare(model) if request.param == "bare" else adapted(model, routing=ROUTINGS[request.param])
    )


# Ranking


def test_scores_are_those_of_plain_forwards(found, byte_tokenizer: Tokenizer) -> None:
    """Over candidates of one token or many, of equal or different length, and prefixes."""
    plain = [by_full_forward(found, byte_tokenizer, example) for example in MIXED]
    for batch_size in (1, 4, 20):
        items = rank(TextModel(found, byte_tokenizer), MIXED, batch_size=batch_size)
        for item, example, expected in zip(items, MIXED, plain, strict=True):
            assert item.scores == pytest.approx(expected, abs=CLOSE)
            assert item.label == example.label
            assert item.prediction == expected.index(max(expected))
            second, first = sorted(expected)[-2:]
            assert item.margin == pytest.approx(first - second, abs=CLOSE)


def test_rows_do_not_influence_each_other(found, byte_tokenizer: Tokenizer) -> None:
    model = TextModel(found, byte_tokenizer)
    alone = [rank(model, [example], batch_size=1)[0] for example in MIXED]
    for batch_size in (1, 3, 8):
        together = rank(model, MIXED[::-1], batch_size=batch_size)[::-1]
        for one, other in zip(alone, together, strict=True):
            assert one.scores == pytest.approx(other.scores, abs=CLOSE)
            assert one.prediction == other.prediction or one.margin < 2 * CLOSE


def test_controls_and_prompts_matter(byte_tokenizer: Tokenizer, tiny_model: MakeModel) -> None:
    """The laws above would hold for a scorer that ignores its input."""
    plain = rank(TextModel(bare(tiny_model("llama")), byte_tokenizer), MIXED, batch_size=8)
    routed = rank(TextModel(adapted(tiny_model("llama")), byte_tokenizer), MIXED, batch_size=8)
    assert all(
        a.scores != pytest.approx(b.scores, abs=0.1) for a, b in zip(plain, routed, strict=True)
    )
    assert len({item.scores for item in plain}) == len(MIXED)


def test_answers_do_not_influence_routes(byte_tokenizer: Tokenizer, tiny_model: MakeModel) -> None:
    """A candidate's score is the same whichever candidates stand beside it."""
    found = adapted(tiny_model("llama"))
    first = question(5, ("the kite", "the cat"))
    second = question(5, ("the kite", "the zzzzzzzzzzzzzzzzzzzzzzzzzz"))
    one, other = rank(TextModel(found, byte_tokenizer), [first, second], batch_size=2)
    assert one.scores[0] == pytest.approx(other.scores[0], abs=CLOSE)


def test_nothing_is_cached_where_no_candidate_is_fed(
    byte_tokenizer: Tokenizer, tiny_model: MakeModel
) -> None:
    """Candidates of one token: one forward, without a cache."""
    model, caches = tiny_model("llama"), []
    model.base_model.register_forward_hook(lambda *seen: caches.append(seen[2].past_key_values))
    examples = [question(number, ("x", "y")) for number in range(3)]
    rank(TextModel(adapted(model), byte_tokenizer), examples, batch_size=3)
    assert caches == [None]
    rank(TextModel(bare(model), byte_tokenizer), MIXED[4:5], batch_size=1)
    assert len(caches) == 3
    assert None not in caches[1:]


def test_of_equal_scores_the_first_wins(byte_tokenizer: Tokenizer, tiny_model: MakeModel) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    equal = question(1, ("the kit", "the cat", "the cup"))
    (item,) = rank(TextModel(bare(model), byte_tokenizer), [equal], batch_size=1)
    assert item == ItemScore(1, 0, item.scores, 0.0)
    assert not item.correct


def test_model_is_left_as_it_was(found, byte_tokenizer: Tokenizer) -> None:
    model = found.model
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    seen: list[tuple[int, int]] = []
    rank(
        TextModel(found, byte_tokenizer),
        MIXED,
        batch_size=5,
        on_progress=lambda *done: seen.append(done),
    )
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == [(5, 13), (10, 13), (13, 13)]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off_while_scoring(byte_tokenizer: Tokenizer, tiny_model: MakeModel) -> None:
    model = tiny_model("llama", attention_dropout=0.5)
    before = rank(TextModel(bare(model), byte_tokenizer), MIXED, batch_size=8)
    model.train()
    assert rank(TextModel(bare(model), byte_tokenizer), MIXED, batch_size=8) == before


def test_question_beyond_the_positions_is_refused(
    byte_tokenizer: Tokenizer, tiny_model: MakeModel
) -> None:
    found = bare(tiny_model("llama", max_position_embeddings=40))
    with refused(DataError):
        rank(TextModel(found, byte_tokenizer), MIXED, batch_size=8)


def test_outputs_that_are_no_numbers_are_refused(
    byte_tokenizer: Tokenizer, tiny_model: MakeModel
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with refused(MocError):
        rank(TextModel(bare(model), byte_tokenizer), MIXED, batch_size=8)


def test_prompt_that_shares_nothing_is_refused(
    byte_tokenizer: Tokenizer, tiny_model: MakeModel
) -> None:
    empty = replace(question(0), eval_prompt="")
    with refused(DataError):
        rank(TextModel(bare(tiny_model("llama")), byte_tokenizer), [empty], batch_size=1)


# The held-out loss


@pytest.mark.parametrize("train_on_inputs", [True, False])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_loss_is_the_mean_over_labelled_tokens(
    byte_tokenizer: Tokenizer, tiny_model: MakeModel, batch_size: int, train_on_inputs: bool
) -> None:
    model = tiny_model("llama")
    encoded = encode_texts(MIXED, byte_tokenizer, max_length=60, train_on_inputs=train_on_inputs)
    total = tokens = 0.0
    for row in encoded.rows:
        labels = torch.tensor([row["labels"]])
        count = int((labels[:, 1:] != IGNORED).sum())
        if count:
            loss = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels).loss.item()
            total, tokens = total + loss * count, tokens + count
    seen: list[tuple[int, int]] = []
    result = lm_loss(
        TextModel(bare(model), byte_tokenizer),
        encoded,
        batch_size=batch_size,
        on_progress=lambda *done: seen.append(done),
    )
    assert result.tokens == tokens
    assert result.loss == pytest.approx(total / tokens, abs=1e-5)
    assert seen[-1] == (13, 13)


def test_what_is_scored_is_the_answer_alone(byte_tokenizer: Tokenizer) -> None:
    (row,) = Choice().encode_answers(MIXED[:1], byte_tokenizer, 500).rows
    scored = [token for token in row["labels"] if token != IGNORED]
    assert byte_tokenizer.decode(scored, skip_special_tokens=True).strip() == "the kite"


def test_positions_begin_with_the_first_token_of_a_row(
    byte_tokenizer: Tokenizer, tiny_model: MakeModel
) -> None:
    model, seen = tiny_model("llama"), []
    base = model.base_model
    base.register_forward_pre_hook(lambda *given: seen.append(given[2]), with_kwargs=True)
    encoded = encode_texts(MIXED[:3], byte_tokenizer, max_length=500)
    lm_loss(TextModel(bare(model), byte_tokenizer), encoded, batch_size=3)
    (given,) = seen
    masks = given["attention_mask"].bool()
    assert not masks.all()
    for mask, positions in zip(masks, given["position_ids"], strict=True):
        assert positions[mask].tolist() == list(range(int(mask.sum())))


def test_only_prompt_tokens_vote(
    byte_tokenizer: Tokenizer, tiny_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks: list[Tensor] = []

    @contextmanager
    def voting(mask: Tensor) -> Iterator[None]:
        masks.append(mask)
        yield

    encoded = encode_texts(MIXED[:3], byte_tokenizer, max_length=500)
    model = bare(tiny_model("llama"))
    monkeypatch.setattr(model, "voting", voting)
    lm_loss(TextModel(model, byte_tokenizer), encoded, batch_size=3)
    (mask,) = masks
    order = sorted(range(3), key=lambda item: -encoded.lengths[item])
    width = max(encoded.lengths)
    for row, item in zip(mask.tolist(), order, strict=True):
        prompt, length = encoded.prompt_lengths[item], encoded.lengths[item]
        assert 0 < prompt < length
        assert row == [0] * (width - length) + [1] * prompt + [0] * (length - prompt)


@pytest.mark.parametrize("batch_size", [2, 13])
def test_loss_does_not_depend_on_the_batch(
    byte_tokenizer: Tokenizer, tiny_model: MakeModel, batch_size: int
) -> None:
    found = adapted(tiny_model("llama"))
    encoded = encode_texts(MIXED, byte_tokenizer, max_length=500, train_on_inputs=False)
    alone = lm_loss(TextModel(found, byte_tokenizer), encoded, batch_size=1)
    together = lm_loss(TextModel(found, byte_tokenizer), encoded, batch_size=batch_size)
    assert together.loss == pytest.approx(alone.loss, abs=1e-5)
    plain = lm_loss(TextModel(bare(tiny_model("llama")), byte_tokenizer), encoded, batch_size=4)
    assert abs(plain.loss - alone.loss) > 0.01


def test_rows_without_labels_are_refused(byte_tokenizer: Tokenizer, tiny_model: MakeModel) -> None:
    encoded = encode_texts(MIXED, byte_tokenizer, max_length=8, train_on_inputs=False)
    assert encoded.answers_cut_off == len(MIXED)
    with refused(DataError):
        lm_loss(TextModel(bare(tiny_model("llama")), byte_tokenizer), encoded, batch_size=4)


# Classification


@pytest.mark.parametrize("batch_size", [1, 4, 32])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_classes_are_those_of_plain_forwards(
    pair_tokenizer: Tokenizer, tiny_model: MakeModel, family: str, batch_size: int
) -> None:
    found = adapted(tiny_model(family, num_labels=3, type_vocab_size=2))
    items = classify(TextModel(found, pair_tokenizer), PAIRS, batch_size=batch_size, max_length=16)
    rows = encode_pairs(PAIRS, pair_tokenizer, max_length=16).rows
    assert len({item.scores for item in items}) > 10
    for item, example, row in zip(items, PAIRS, rows, strict=True):
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "token_type_ids")}
        with torch.no_grad():
            logits = found.model(**inputs).logits[0]
        assert item.scores == pytest.approx(logits.tolist(), abs=1e-5)
        assert item.prediction == logits.argmax().item()
        assert item.label == example.label


def test_one_output_is_a_regression(pair_tokenizer: Tokenizer, tiny_model: MakeModel) -> None:
    pairs = [PairExample("stsb", e.text_a, e.text_b, float(e.label)) for e in PAIRS]
    found = bare(tiny_model("bert", num_labels=1))
    kind = Pairs(("pearson", "spearman"), 1)
    evaluation = kind.score(TextModel(found, pair_tokenizer), pairs, ScoringOptions(8, 64))
    assert list(evaluation.metrics) == ["pearson", "spearman"]
    assert evaluation.main.majority == 0
    item = evaluation.items[0]
    assert isinstance(item, PairScore)
    assert item.prediction == item.scores[0]


def test_pair_loss_is_the_loss_of_training(
    pair_tokenizer: Tokenizer, tiny_model: MakeModel
) -> None:
    assert pair_loss([PairScore(1, 1, (0.0, 0.0)), PairScore(0, 0, (0.0, 0.0))]) == pytest.approx(
        torch.log(torch.tensor(2.0)).item()
    )
    assert pair_loss([PairScore(1.0, 3.0, (3.0,)), PairScore(0.0, 0.0, (0.0,))]) == 2.0


# Results


def test_choice_result(byte_tokenizer: Tokenizer, tiny_model: MakeModel) -> None:
    found = bare(tiny_model("llama"))
    examples = [question(number) for number in range(9)]
    evaluation = Choice().score(TextModel(found, byte_tokenizer), examples, ScoringOptions(4))
    right = sum(item.correct for item in evaluation.items if isinstance(item, ItemScore))
    main = evaluation.main
    assert (evaluation.task, evaluation.metric, main.n) == ("boolq", "accuracy", 9)
    assert main.value == pytest.approx(right / 9)
    assert main.majority == pytest.approx(1 / 3)
    assert evaluation.seconds > 0


def test_tasks_are_scored_one_at_a_time(byte_tokenizer: Tokenizer, tiny_model: MakeModel) -> None:
    mixed = [question(0), replace(question(1), task="piqa")]
    model = TextModel(bare(tiny_model("llama")), byte_tokenizer)
    for examples in (mixed, []):
        with refused(DataError):
            Choice().score(model, examples, ScoringOptions(4))


def test_average_is_the_plain_mean() -> None:
    results = [
        Evaluation(task, {"accuracy": Score(value, 0.0, 0.0, n)}, [], 0.0)
        for task, value, n in (("boolq", 0.5, 10), ("piqa", 1.0, 1000))
    ]
    assert average(results) == 0.75


# Real weights


@pytest.mark.real
def test_real_model_scores_the_same_in_any_batch(
    real_data: Path, real_weights: Callable[[str], Path]
) -> None:
    folder = real_weights("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = bare(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    path = real_data / "commonsense"
    examples = load_examples("commonsense", "openbookqa", "test", path=path)[:1]
    examples += load_examples("commonsense", "boolq", "test", path=path)[:1]
    alone = rank(TextModel(found, tokenizer), examples, batch_size=1)
    together = rank(TextModel(found, tokenizer), examples, batch_size=4)
    for one, other in zip(alone, together, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-3)
        assert one.prediction == other.prediction or one.margin < 1e-3
    expected = by_full_forward(found, tokenizer, examples[0])
    assert alone[0].scores == pytest.approx(expected, abs=1e-3)
