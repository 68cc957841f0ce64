"""Where methods meet: MoC with all weight on the local control trains as Control does."""

import pytest
import torch
from support.models import make_tiny_model
from torch.nn.functional import cross_entropy

from moc_cli.methods import attach
from moc_cli.recipe.methods import ControlMethod, MocMethod


def train(method, **changes) -> dict[str, torch.Tensor]:
    """The controls after ten steps of AdamW on random tokens, in float64."""
    model = make_tiny_model("llama", **changes).double().train()
    adapted = attach(model, method, seed=7)
    model.double()
    named = adapted.named_trainables()
    decay = [p for name, p in named.items() if not adapted.no_decay(name)]
    rest = [p for name, p in named.items() if adapted.no_decay(name)]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        ids = torch.randint(5, 200, (4, 8), generator=generator)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in named.items() if name.startswith("controls.")}


@pytest.mark.parametrize("top_k", [1, 2])
def test_alpha_one_without_balance_trains_as_control(top_k):
    moc = {"rank": 4, "alpha": 1.0, "top_k": top_k, "balance": {"weight": 0.0}}
    ours = train(MocMethod.model_validate(moc))
    control = train(ControlMethod(rank=4))
    assert ours.keys() == control.keys()
    for name, parameter in ours.items():
        assert parameter.abs().max() > 0
        assert torch.allclose(parameter, control[name], rtol=0, atol=1e-10), name
    other = train(MocMethod.model_validate(moc | {"alpha": 0.5}))
    assert any(not torch.allclose(other[name], control[name], atol=1e-4) for name in control)


def test_a_pool_of_one_trains_as_control():
    moc = {"rank": 4, "alpha": 0.3, "sites": "ffn", "balance": {"weight": 0.0}}
    ours = train(MocMethod.model_validate(moc), num_hidden_layers=1)
    control = train(ControlMethod(rank=4, sites="ffn"), num_hidden_layers=1)
    for name, parameter in ours.items():
        assert torch.allclose(parameter, control[name], rtol=0, atol=1e-10), name
