"""What a method leaves alone: gates in weight decay, and the base's own flags."""

import pytest
from support.models import make_tiny

from moc_cli.methods import attach
from moc_cli.recipe.methods import LoraMethod, MocMethod, MolexMethod

GATE = {"projection_dim": 8}


@pytest.mark.parametrize("share_gate", [True, False])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_weight_decay_spares_gates_alone(kind, share_gate):
    method = MocMethod(rank=4, gate=GATE | {"kind": kind}, share_gate=share_gate)
    adapted = attach(make_tiny("llama"), method, new_modules=(), seed=1)
    spared = {name for name in adapted.named_trainables() if adapted.no_decay(name)}
    assert spared == {name for name in adapted.named_trainables() if ".gates." in f".{name}"}
    assert spared


@pytest.mark.parametrize("method", [MocMethod(gate=GATE), LoraMethod(), MolexMethod(gate=GATE)])
def test_detach_gives_the_base_its_flags_back(method):
    model = make_tiny("llama").requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    attach(model, method, new_modules=(), seed=1).detach()
    after = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert after == before
    assert set(after.values()) == {True, False}
