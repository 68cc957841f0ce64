"""Rows without an attention mask: padding at their ends does not vote, and the rest is said."""

import warnings
from typing import Any

import pytest
import torch
from support.messages import warned
from support.models import make_batch, make_tiny, train_controls

from moc_cli.adapter.config import make_method
from moc_cli.methods import Adapted, attach
from moc_cli.models.masks import inside_padding

MOC = {"name": "moc", "rank": 4, "alpha": 0.5, "gate": {"projection_dim": 8}}


def make(family: str = "llama", **options: Any) -> Adapted:
    given = MOC | options
    adapted = attach(make_tiny(family).eval(), make_method(given.pop("name"), given), seed=5)
    train_controls(adapted.named_trainables())
    return adapted


@pytest.mark.parametrize("method", ["moc", "molex"])
def test_padding_by_the_pad_token_does_not_vote(method: str) -> None:
    adapted = make() if method == "moc" else make(name="molex", rank=2, alpha=4)
    given = make_batch(6, "right")
    mask = given["attention_mask"].bool()
    with torch.no_grad():
        masked = adapted.model(**given).logits[mask]
        routes = adapted.routes()
        with warned(UserWarning):
            unmasked = adapted.model(given["input_ids"]).logits[mask]
    assert torch.allclose(masked, unmasked, atol=1e-5)
    assert all(torch.equal(routes[site], choice) for site, choice in adapted.routes().items())


def test_it_is_said_once_and_only_where_tokens_vote_for_others() -> None:
    ids = make_batch(2)["input_ids"]
    token = {"routing": {"level": "token"}}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        make(**token).model(ids)
        make().model(ids[:1].clamp(min=5))
    with warnings.catch_warnings(record=True) as said, torch.no_grad():
        warnings.simplefilter("default")
        adapted = make()
        for _ in range(3):
            adapted.model(ids.clamp(min=5))
    assert len([one for one in said if "attention_mask" in str(one.message)]) == 1


def test_only_the_ends_of_a_row_are_padding() -> None:
    ids = torch.tensor([[0, 5, 0, 6, 0], [5, 6, 7, 8, 9], [0, 0, 0, 0, 0]])
    inside = inside_padding(ids, pad=0)
    assert inside is not None
    assert inside.int().tolist() == [[0, 1, 1, 1, 0], [1] * 5, [1] * 5]
    assert inside_padding(ids[1:2], pad=0) is None


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_makes_its_own_mask(cache: str) -> None:
    ids = make_batch(2)["input_ids"].clamp(min=5)
    options = {"max_new_tokens": 2, "cache_implementation": cache, "pad_token_id": 0}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message="no attention_mask was given")
        make().model.generate(ids, attention_mask=torch.ones_like(ids), **options)
