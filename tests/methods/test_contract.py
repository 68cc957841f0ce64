"""One contract, every method, every family: what any of them owes its model and its user.

What a method cannot give by its definition is listed here by name.
"""

import copy
import pickle

import pytest
import torch
from support.checkpointing import checkpoint_activations
from support.models import DECODERS, FAMILIES, WIDTH, has_hooks, make_batch, make_tiny
from torch import nn

from moc_cli.methods import Adapted, attach
from moc_cli.recipe.methods import ControlMethod, DoraMethod, LoraMethod, MocMethod, MolexMethod

RANK, GATE = 4, 8
_LOW_RANK = {"rank": RANK, "alpha": 8, "dropout": 0.0}
METHODS = {
    "moc": MocMethod(rank=RANK, gate={"projection_dim": GATE}),
    "moc-linear": MocMethod(rank=RANK, top_k=2, share_gate=False, gate={"kind": "linear"}),
    "moc-probability": MocMethod(
        rank=RANK,
        gate={"projection_dim": GATE, "estimator": "probability"},
    ),
    "control": ControlMethod(rank=RANK),
    "lora": LoraMethod(**_LOW_RANK),
    "dora": DoraMethod(**_LOW_RANK),
    "pissa": LoraMethod(**_LOW_RANK, init="pissa"),
    "molex": MolexMethod(**_LOW_RANK, gate={"projection_dim": GATE}),
}
# MoLEx mixes in a second layer from the start.
NOT_THE_BASE_AT_INIT = {"molex"}
# PiSSA moves a part of each weight into the adapter; DoRA divides each row by its own norm.
THE_BASE_UP_TO_ROUNDING_AT_INIT = {"pissa", "dora"}
REWRITES_THE_BASE = {"pissa"}
# A gate's scalars take no part in a step in which every layer chose itself.
MAY_STAND_STILL = {"molex": "weight_logits"}
# In half precision the bare attention of this family mixes types and fails by itself.
NO_HALF_PRECISION = {"deberta"}
# Three ways into a model: at blocks, at linear modules, at whole layers. Each is tried in every
# family; the other methods go one of these ways and are tried where families differ most.
WAYS = ("moc", "lora", "molex")
KINDS = ("llama", "phi3", "gemma3", "bert", "modernbert")
ALL = [(m, family) for m in METHODS for family in (FAMILIES if m in WAYS else KINDS)]
FEW = [(m, family) for m in METHODS for family in KINDS]
every = pytest.mark.parametrize(("method", "family"), ALL)


def make(method: str, family: str, dtype: torch.dtype = torch.float32) -> Adapted:
    return attach(make_tiny(family).to(dtype), METHODS[method], seed=1)


def moved(adapted: Adapted) -> Adapted:
    """Take every trained parameter away from where it started."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.named_trainables().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted


def logits(model: nn.Module, family: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**make_batch(side="left" if family in DECODERS else "right")).logits


def expected_size(adapted: Adapted, sizes: dict[str, torch.Size], method: str) -> int:
    """The formula for the number of trained values; `sizes`: the linear modules of the base."""
    layers = 2
    if method in ("moc", "moc-linear", "moc-probability", "control"):
        cosine, linear = GATE * WIDTH + 2 * layers * GATE + 1, 2 * layers * WIDTH
        gates = {
            "moc": cosine,
            "moc-probability": cosine,
            "moc-linear": linear,
            "control": 0,
        }
        return 2 * layers * 2 * RANK * WIDTH + gates[method]
    targets = [n.removeprefix("base_model.model.") for n in adapted.named_trainables()]
    targets = [n.removesuffix(".lora_A.weight") for n in targets if "lora_A" in n]
    assert len(targets) >= 3 * layers
    expected = sum(RANK * sum(sizes[name]) for name in targets)
    expected += sum(sizes[name][0] for name in targets) if method == "dora" else 0
    return expected + (GATE * WIDTH + layers * GATE + 1 if method == "molex" else 0)


@every
def test_the_base_at_init_when_disabled_and_after_detaching(method, family):
    """And the number of parameters is its formula."""
    model = make_tiny(family)
    attributes, before = set(vars(model)), copy.deepcopy(model.state_dict())
    sizes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    total = sum(p.numel() for p in model.parameters())
    expected = logits(model, family)
    adapted = attach(model, METHODS[method], seed=1)
    counts, size = adapted.counts(), expected_size(adapted, sizes, method)
    assert (counts.adapter, counts.modules, counts.base) == (size, 0, total)
    slack = 1e-4 if method in THE_BASE_UP_TO_ROUNDING_AT_INIT else 0
    same = (logits(model, family) - expected).abs().max() <= slack
    assert same == (method not in NOT_THE_BASE_AT_INIT)
    moved(adapted)
    assert not torch.allclose(logits(model, family), expected, atol=1e-4)
    slack = 1e-4 if method in REWRITES_THE_BASE else 0
    with adapted.disabled():
        assert (logits(model, family) - expected).abs().max() <= slack
    adapted.detach()
    assert (logits(model, family) - expected).abs().max() <= slack
    after = model.state_dict()
    assert set(after) == set(before)
    assert all((after[name] - before[name]).abs().max() <= slack for name in before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not has_hooks(model)
    assert set(vars(model)) == attributes


@every
def test_one_step_changes_the_adapter_alone_and_its_state_brings_it_back(method, family):
    adapted = moved(make(method, family))
    model = adapted.model
    own = {id(parameter) for parameter in adapted.named_trainables().values()}
    frozen = {n: p.clone() for n, p in model.named_parameters() if id(p) not in own}
    start = adapted.state()
    optimizer = torch.optim.SGD(adapted.named_trainables().values(), lr=1.0)
    model.train()(**make_batch()).logits.square().mean().backward()
    assert all(p.grad is not None for p in adapted.named_trainables().values())
    optimizer.step()
    model.eval()
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    still = {n for n, v in adapted.state().items() if torch.equal(v, start[n])}
    assert still <= {MAY_STAND_STILL.get(method)}
    other = make(method, family)
    other.load_state(adapted.state())
    assert torch.equal(logits(other.model, family), logits(model, family))


# Of moc and molex: tests/models/test_ports.py and tests/nn/test_molex.py, with two forwards each.
@pytest.mark.parametrize(("method", "family"), [c for c in ALL if c[0] not in ("moc", "molex")])
def test_gradients_are_equal_with_activation_checkpointing(method, family):
    adapted = moved(make(method, family))
    model = adapted.model.train()
    grads = []
    for prepare in (lambda: None, lambda: checkpoint_activations(model)):
        prepare()
        model(**make_batch()).logits.square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in adapted.named_trainables().items()})
        model.zero_grad()
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


# What a copy must bind again are the ways into a model, which are the method's.
@pytest.mark.parametrize(("method", "family"), FEW)
def test_copies_and_pickles_stand_alone(method, family):
    adapted = moved(make(method, family))
    expected = logits(adapted.model, family)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert torch.equal(logits(other.model, family), expected)
        with torch.no_grad():
            for parameter in other.named_trainables().values():
                parameter.mul_(0.5)
        assert not torch.equal(logits(other.model, family), expected)
        assert torch.equal(logits(adapted.model, family), expected)


@every
def test_a_bfloat16_base_trains_a_float32_adapter(method, family):
    if family in NO_HALF_PRECISION:
        return
    adapted = make(method, family, torch.bfloat16)
    out = adapted.model.train()(**make_batch()).logits
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    for parameter in adapted.named_trainables().values():
        assert parameter.dtype == torch.float32
        assert parameter.grad.isfinite().all()
