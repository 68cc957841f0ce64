"""Batch, order, padding and answers change no prediction, and only prompts decide routes."""

from dataclasses import replace

import pytest
import torch
from support.kept_routes import watching
from support.models import VOCABULARY, make_byte_tokenizer, make_tiny_model, train_controls
from support.questions import MIXED, question
from torch import Tensor
from transformers import PreTrainedTokenizerFast as Tokenizer
from transformers.generation import GenerationMixin

from moc_cli.data.batches import Side
from moc_cli.data.encode import encode_texts, prompt_tokens
from moc_cli.data.examples import ChoiceExample
from moc_cli.methods import Adapted, TextModel, attach
from moc_cli.recipe.methods import MocMethod
from moc_cli.scoring import generate as generating
from moc_cli.scoring import likelihood
from moc_cli.scoring.forward import pad
from moc_cli.scoring.generate import ExtractedAnswer, generate
from moc_cli.scoring.loss import lm_loss
from moc_cli.scoring.rank import ItemScore, query_of, rank

MARGIN = 1e-3
ITEMS = [*MIXED, *(question(number) for number in range(13, 50))]
Found = list[ItemScore] | list[ExtractedAnswer]


@pytest.fixture(scope="module")
def routed() -> Adapted:
    """A model of six sites whose rows take different routes, each changing the outcome."""
    model = make_tiny_model("llama", num_hidden_layers=3)
    method = MocMethod(rank=4, alpha=0.5, gate={"projection_dim": 8})
    found = attach(model, method, seed=3)
    train_controls(found.named_trainables())
    return found


@pytest.fixture(scope="module")
def alone(routed: Adapted) -> list[ItemScore]:
    """Every item in a batch of its own."""
    torch.set_num_threads(1)
    return rank(TextModel(routed, make_byte_tokenizer()), ITEMS, batch_size=1)


def compare(name: str, one: Found, other: Found) -> None:
    """No prediction differs but among near ties, which are listed."""
    differing = [
        (number, getattr(a, "margin", None))
        for number, (a, b) in enumerate(zip(one, other, strict=True))
        if a.prediction != b.prediction
    ]
    for number, margin in differing:
        print(f"{name}: item {number} differs, margin {margin}")
    assert [number for number, margin in differing if margin is None or margin > MARGIN] == []


def by_padded_forward(
    found: Adapted, tokenizer: Tokenizer, examples: list[ChoiceExample], side: Side, size: int
) -> list[ItemScore]:
    """Rank by whole texts in padded batches, without a cache; only the prompts vote."""
    texts = []
    for item, example in enumerate(examples):
        alone, *joint = prompt_tokens(tokenizer, example)
        shared = next(
            place for place, ids in enumerate(zip(alone, *joint, strict=False)) if len(set(ids)) > 1
        )
        texts += [(item, ids, shared) for ids in joint]
    scores: list[list[float]] = [[] for _ in examples]
    for first in range(0, len(texts), size):
        batch = texts[first : first + size]
        ids, mask = pad([ids for _, ids, _ in batch], 0, side, torch.device("cpu"))
        places = (mask.cumsum(1) - 1).clamp(min=0)
        prompts = torch.tensor([shared for _, _, shared in batch]).unsqueeze(1)
        with torch.no_grad(), found.voting(mask * (places < prompts)):
            logits = found.model(
                input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False
            ).logits
        chosen = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        scored = mask[:, 1:].bool() & (places[:, 1:] >= prompts)
        for (item, _, _), value in zip(batch, (chosen * scored).sum(1).tolist(), strict=True):
            scores[item].append(value)
    return [
        ItemScore(example.label, row.index(max(row)), tuple(row), sorted(row)[-1] - sorted(row)[-2])
        for example, row in zip(examples, scores, strict=True)
    ]


def test_rows_take_at_least_three_routes(routed: Adapted, byte_tokenizer: Tokenizer) -> None:
    """Otherwise the laws below would say little."""
    with watching(routed) as seen:
        rank(TextModel(routed, byte_tokenizer), ITEMS, batch_size=64)
    sites = seen[0]
    assert len(sites) == 6
    whole = torch.cat([sites[site] for site in sorted(sites)], dim=1)  # (B, 6)
    assert len(whole.unique(dim=0)) >= 3
    assert max(len(ids.unique()) for ids in sites.values()) >= 3


@pytest.mark.parametrize("order", ["given", "shuffled"])
@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_ranking_depends_on_no_batch(
    routed: Adapted,
    alone: list[ItemScore],
    byte_tokenizer: Tokenizer,
    batch_size: int,
    order: str,
) -> None:
    places = list(range(len(ITEMS)))
    if order == "shuffled":
        places = torch.randperm(len(ITEMS), generator=torch.Generator().manual_seed(1)).tolist()
    items = [ITEMS[place] for place in places]
    mixed = rank(TextModel(routed, byte_tokenizer), items, batch_size=batch_size)
    compare(f"batch {batch_size}, {order}", [alone[place] for place in places], mixed)
    assert sum(item.margin > MARGIN for item in alone) > 45


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [8, 64])
def test_ranking_depends_on_no_padding_side(
    routed: Adapted,
    alone: list[ItemScore],
    byte_tokenizer: Tokenizer,
    batch_size: int,
    side: Side,
) -> None:
    """The product pads prompts on the left; whole texts, padded on either side, say the same."""
    padded = by_padded_forward(routed, byte_tokenizer, ITEMS, side, batch_size)
    compare(f"batch {batch_size}, padded on the {side}", alone, padded)
    for one, other in zip(alone, padded, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=5e-4)


def test_every_candidate_has_its_items_route(routed: Adapted, byte_tokenizer: Tokenizer) -> None:
    """Of a batch, row by row: cache rows are repeated for candidates of several tokens."""
    items = [example for example in ITEMS if len(example.candidates[0]) > 3]
    with watching(routed) as seen:
        rank(TextModel(routed, byte_tokenizer), items, batch_size=64)
    queries = [query_of(byte_tokenizer, example) for example in items]
    queries.sort(key=lambda query: -query.cost.tokens)
    rows = [
        row for row, query in enumerate(queries) for branch in query.branches if len(branch) > 1
    ]
    prompts, *_, branches = seen
    assert len(rows) > 2 * len(items)
    for site, ids in prompts.items():
        assert len(ids) == len(items)
        assert torch.equal(branches[site], ids[rows])


def test_an_answers_text_changes_no_route(routed: Adapted, byte_tokenizer: Tokenizer) -> None:
    other = ("the zebra crossing", "the zoo", "the zzz")
    items = ITEMS[5:]
    changed = [
        replace(item, candidates=other, train_text=item.eval_prompt + other[item.label])
        for item in items
    ]
    routes, scores = [], []
    for examples in (items, changed):
        with watching(routed) as seen:
            scores.append(rank(TextModel(routed, byte_tokenizer), examples, batch_size=64))
        routes.append(seen[:1])
        for example in examples[:8]:  # the held-out loss has whole texts in one forward
            encoded = encode_texts([example], byte_tokenizer, max_length=500)
            with watching(routed) as seen:
                lm_loss(TextModel(routed, byte_tokenizer), encoded, batch_size=1)
            routes[-1] += seen
    assert all(a.scores != b.scores for a, b in zip(*scores, strict=True))
    for one, two in zip(*routes, strict=True):
        assert len(one) == 6
        assert all(torch.equal(one[site], two[site]) for site in one)


@pytest.mark.parametrize("protocol", ["rank", "generate"])
def test_masked_tokens_change_nothing(
    routed: Adapted, byte_tokenizer: Tokenizer, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever ids stand where the mask is 0, every score and every answer is the same."""
    module = likelihood if protocol == "rank" else generating
    score = rank if protocol == "rank" else generate
    plain = score(TextModel(routed, byte_tokenizer), ITEMS[:16], batch_size=8)
    replaced = []

    def scrambled(
        rows: list[list[int]], fill: int, side: Side, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        ids, mask = pad(rows, fill, side, device)
        other = torch.randint(VOCABULARY, ids.shape)
        replaced.append(int(((other != ids) & (mask == 0)).sum()))
        return torch.where(mask == 1, ids, other), mask

    monkeypatch.setattr(module, "pad", scrambled)
    assert score(TextModel(routed, byte_tokenizer), ITEMS[:16], batch_size=8) == plain
    assert sum(replaced) > 100


# Generating


def by_plain_generate(found, tokenizer: Tokenizer, example: ChoiceExample, **options) -> str:
    """One prompt alone, without padding, in one call of transformers' own generate."""
    inputs = tokenizer(example.eval_prompt, return_tensors="pt")
    settings = {"num_beams": 4, "do_sample": False, "max_new_tokens": 32} | options
    with torch.no_grad():
        written = GenerationMixin.generate(
            found.model,
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **settings,
        )
    return tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generated_answers_are_those_of_plain_generate(
    routed: Adapted, byte_tokenizer: Tokenizer
) -> None:
    items = ITEMS[:8]
    expected = [by_plain_generate(routed, byte_tokenizer, item).strip() for item in items]
    model = TextModel(routed, byte_tokenizer)
    for batch_size in (1, 3, 64):
        found = generate(model, items[::-1], batch_size=batch_size)[::-1]
        assert [answer.output for answer in found] == expected
    assert len(set(expected)) > 4
    greedy = [by_plain_generate(routed, byte_tokenizer, item, num_beams=1) for item in items[:4]]
    assert greedy != expected[:4]


def test_the_models_own_wishes_are_ignored(routed: Adapted, byte_tokenizer: Tokenizer) -> None:
    own = routed.model.generation_config
    plain = generate(TextModel(routed, byte_tokenizer), ITEMS[:6], batch_size=6)
    try:
        wishes = type(own)(
            repetition_penalty=5.0, do_sample=True, temperature=3.0, max_new_tokens=2
        )
        routed.model.generation_config = wishes
        assert generate(TextModel(routed, byte_tokenizer), ITEMS[:6], batch_size=6) == plain
        assert routed.model.generation_config is wishes
    finally:
        routed.model.generation_config = own
