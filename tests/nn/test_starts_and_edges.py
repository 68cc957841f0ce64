"""What controls and gates start from, and what they do at the edges: types, limits, no voters."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moc_cli.nn.control import Control
from moc_cli.nn.forward import Forward
from moc_cli.nn.gate import GATES, CosineGate, Gate, LinearGate, probabilities
from moc_cli.nn.mixture import Mixture
from moc_cli.nn.routing import Routing

WIDTH, SIZE = 6, 4


def assert_kaiming(values: torch.Tensor) -> None:
    """Kaiming-uniform with a = √5 over rows of d numbers: uniform in ±1/√d."""
    bound = 1 / math.sqrt(values.shape[1])
    assert 0.99 * bound < values.abs().max() <= bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)


def test_a_control_starts_as_its_formula_says():
    control = Control(400, 50, torch.Generator().manual_seed(0))
    assert_kaiming(control.A.detach())
    assert not control.B.any()


def test_gates_start_as_their_formulas_say():
    generator = torch.Generator().manual_seed(0)
    assert_kaiming(LinearGate(400, 50, generator=generator).weight.detach())
    gate = CosineGate(400, 50, 80, generator)
    assert_kaiming(gate.projection.detach())
    assert gate.experts.std().item() == pytest.approx(0.01, rel=0.05)
    assert abs(gate.experts.mean().item()) < 1e-3
    assert gate.log_temperature.item() == pytest.approx(math.log(2))


def test_the_temperature_is_at_most_100():
    gate, x = CosineGate(WIDTH, SIZE, 5), torch.randn(2, 3, WIDTH)
    with torch.no_grad():
        gate.log_temperature.fill_(math.log(100))
        highest = gate(x)
        gate.log_temperature.fill_(9.0)
        assert torch.equal(gate(x), highest)


@pytest.mark.parametrize("kind", GATES)
def test_bfloat16_states_are_routed_in_float32(kind):
    gate, x = GATES[kind](WIDTH, SIZE, 5), torch.randn(2, 3, WIDTH, dtype=torch.bfloat16)
    p = probabilities(gate(x))
    assert p.dtype == torch.float32
    assert torch.equal(p, probabilities(gate(x.float())))


@pytest.mark.parametrize("kind", GATES)
def test_the_gates_gradients_are_those_of_its_formula(kind):
    """In bfloat16 within its rounding, 8 bits of each product's factors."""
    torch.manual_seed(0)
    for dtype, bound in ((torch.float64, 1e-6), (torch.bfloat16, 3 * 2**-8)):
        gate = GATES[kind](WIDTH, SIZE, 5).double()
        x, weights = torch.randn(4, 30, WIDTH).to(dtype), torch.randn(4, 30, SIZE)
        states = x.double().requires_grad_()
        if kind == "cosine":
            features = F.normalize(states @ gate.projection.T, dim=-1)
            scale = gate.log_temperature.exp()
            logits = scale * features @ F.normalize(gate.experts, dim=-1).T
        else:
            logits = states @ gate.weight.T
        (logits.softmax(-1) * weights).sum().backward()
        expected = [states.grad, *(parameter.grad for parameter in gate.parameters())]
        gate.zero_grad()
        gate = gate if dtype == torch.float64 else gate.float()
        given = x.detach().clone().requires_grad_()
        (gate(given).softmax(-1) * weights).sum().backward()
        assert given.grad.dtype == dtype
        made = [given.grad, *(parameter.grad for parameter in gate.parameters())]
        for ours, theirs in zip(made, expected, strict=True):
            assert (ours.double() - theirs).abs().max() <= bound * theirs.abs().max()


def test_a_gates_backward_makes_no_wide_copy_of_half_precision_states():
    gate = CosineGate(64, SIZE, 5)
    x = torch.randn(2, 30, 64).bfloat16().requires_grad_()
    total = gate(x).sum()
    with Made() as made:
        total.backward()
    assert made.sizes
    assert all(size < x.numel() for size in made.sizes)


class Made(TorchDispatchMode):
    """How many numbers each float32 tensor holds that is made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.sizes.append(result.numel())
        return result


def test_the_own_control_is_left_out_of_pools_that_are_not_shared():
    routing = Routing(share_gate=False, exclude_local=True, top_k=2, projection_dim=5)
    mixture = Mixture(3, WIDTH, ("attn", "ffn"), 2, 1.0, routing)
    for site in mixture.sites:
        mixture.update(site, torch.randn(2, 3, WIDTH))
        assert sorted(site.choice.flatten().tolist()) == sorted({0, 1, 2} - {site.local})


@pytest.mark.parametrize("level", ["batch", "sample"])
def test_rows_without_voters_are_harmless(level):
    mixture = Mixture(2, WIDTH, ("attn", "ffn"), 2, 1.0, Routing(level=level, projection_dim=5))
    for name, parameter in mixture.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    x, site = torch.randn(2, 3, WIDTH), mixture.sites[0]
    for voters in ([[True] * 3, [False] * 3], [[False] * 3] * 2):
        mixture.zero_grad()
        mixture.current = Forward(torch.tensor(voters))
        update = mixture.update(site, x)
        update.sum().backward()
        assert update.isfinite().all()
        assert site.loss.isfinite()
        grads = [p.grad for p in mixture.parameters() if p.grad is not None]
        assert grads
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("kind", GATES)
def test_under_autocast_routes_are_decided_in_float32(kind):
    """The products follow autocast; the gate and the vote do not: a vote hangs on small numbers."""
    mixture = Mixture(3, WIDTH, ("attn", "ffn"), 2, 1.0, Routing(gate=kind, projection_dim=5))
    for site in mixture.sites:
        nn.init.normal_(mixture.control(site.index).B)
    x, seen = torch.randn(4, 5, WIDTH), []

    class Watcher:
        def decided(self, site, decision):
            seen.append(decision.probabilities)

    mixture.watchers.append(Watcher())
    exact = mixture.update(mixture.sites[1], x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        update = mixture.update(mixture.sites[1], x)
    assert update.dtype == torch.bfloat16
    assert torch.allclose(update.float(), exact, rtol=0.05, atol=0.05)
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("level", ["batch", "sample"])
def test_nothing_of_the_states_size_is_kept_but_the_states(level):
    """Above all no copy in float32, and no gathered controls for each site."""
    mixture = Mixture(8, 64, ("attn", "ffn"), 2, 1.0, Routing(level=level, projection_dim=8))
    x = torch.randn(4, 32, 64, dtype=torch.bfloat16).requires_grad_()
    mixture.current = Forward(shape=(4, 32))
    mixture.prepare(x.dtype)
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixture.update(mixture.sites[0], x)
        first = dict(kept)
        mixture.update(mixture.sites[1], x)
    assert x.untyped_storage().data_ptr() in first
    more = sum(size for place, size in kept.items() if place not in first)
    probabilities = 4 * 32 * 16 * 4  # bytes: one float32 for each token and control
    rest = more - probabilities
    assert rest < x.untyped_storage().nbytes() / 2  # features of 8 numbers, A x of 4, a few more


def test_second_derivatives_are_refused_not_lost():
    mixture = Mixture(3, WIDTH, ("attn", "ffn"), 2, 1.0, Routing(projection_dim=5))
    x = torch.randn(2, 3, WIDTH).requires_grad_()
    update = mixture.update(mixture.sites[0], x)
    (grad,) = torch.autograd.grad(update.exp().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_gate_without_features_cannot_be_made():
    class Empty(Gate):
        pass

    with pytest.raises(TypeError, match="features"):
        Empty()
