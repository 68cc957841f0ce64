"""Norms and gated blocks that keep less: the same numbers in fewer bytes."""

from typing import Any

import pytest
import torch
from support.models import make_tiny_model, tiny_config
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from moc_cli.models.lean import keep_less
from moc_cli.nn import lean
from moc_cli.nn.lean import gated_product, rms_norm
from moc_cli.planning.fake_device import META, FakeDevice
from moc_cli.planning.live_memory import LiveMemory, PhasePart


def frozen(family: str, **changes: Any) -> nn.Module:
    return make_tiny_model(family, **changes).requires_grad_(False)


def outputs_and_gradient(model: Any) -> tuple[Tensor, Tensor]:
    states = torch.randn(2, 9, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    states.requires_grad_()
    logits = model(inputs_embeds=states).logits
    logits.float().square().mean().backward()
    assert states.grad is not None
    return logits.detach(), states.grad


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "olmo2"])
def test_outputs_are_the_same_and_gradients_to_rounding(family: str) -> None:
    plain, changed = frozen(family), frozen(family)
    keep_less(changed)
    assert [module for module in changed.modules() if "forward" in vars(module)]
    (expected, gradient), (logits, own) = map(outputs_and_gradient, (plain, changed))
    assert torch.equal(logits, expected)
    assert torch.allclose(own, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_keeps_its_input_alone(dtype: torch.dtype) -> None:
    norm = LlamaRMSNorm(32).to(dtype).requires_grad_(False)
    norm.weight.normal_()
    x = torch.randn(3, 5, 32, dtype=dtype, requires_grad=True)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = rms_norm(x, norm.weight, norm.variance_epsilon)
    assert torch.equal(y, norm(x))
    beside = [t for t in kept if t.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr())]
    assert sum(t.numel() for t in beside) == 15, "a factor for each token"
    grad = torch.randn_like(y)
    (own,), (expected,) = (torch.autograd.grad(out, x, grad) for out in (y, norm(x)))
    assert torch.allclose(own, expected, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-5)


@pytest.mark.parametrize("part", [1000, 10])
@pytest.mark.parametrize("activation", [nn.SiLU(), nn.GELU(), nn.Identity()])
def test_the_product_keeps_its_factors_alone(
    activation: nn.Module, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients take their places, all at once or some rows at a time."""
    monkeypatch.setattr(lean, "PART", part)
    gate, up = (torch.randn(2, 3, 8, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, 3, 8)
    expected = torch.autograd.grad(activation(gate) * up, (gate, up), grad)
    kept: list[Tensor] = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        product = gated_product(gate, up, activation)
    assert torch.equal(product, activation(gate) * up)
    assert [t.data_ptr() for t in kept] == [gate.data_ptr(), up.data_ptr()]
    own = torch.autograd.grad(product, (gate, up), grad)
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))
    assert [t.data_ptr() for t in own] == [gate.data_ptr(), up.data_ptr()]


def test_a_second_backward_pass_of_a_product_is_an_error() -> None:
    gate, up = (torch.randn(3, 8, requires_grad=True) * 2 for _ in range(2))
    product = gated_product(gate, up, nn.SiLU())
    product.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_backward_pass_makes_no_tensor_of_the_size_of_the_product(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lean, "PART", 2**10)
    with META:
        gate, up = (torch.empty(64, 2**8, device=META, requires_grad=True) for _ in range(2))
        grad = torch.empty(64, 2**8, device=META)
    with FakeDevice(), LiveMemory("meta", lambda: PhasePart("all", "all")) as memory:
        torch.autograd.grad(gated_product(gate, up, nn.SiLU()), (gate, up), grad)
    size = 64 * 2**8 * 4
    assert 4 * size < memory.peak < 4.3 * size, "gate, up, the product, its gradient, and parts"


def test_a_trained_norm_and_other_kinds_stay_as_they_are() -> None:
    trained = make_tiny_model("llama")
    keep_less(trained)
    changed = {type(m).__name__ for m in trained.modules() if "forward" in vars(m)}
    assert changed == {"LlamaMLP"}
    for family in ("gpt_neox", "phi"):
        other = frozen(family)
        keep_less(other)
        assert not [module for module in other.modules() if "forward" in vars(module)]


def test_a_training_step_takes_less() -> None:
    """In bfloat16 a quarter of what layers keep is gone, and more."""
    peaks = []
    for wanted in (False, True):
        with META:
            config = tiny_config("llama", num_hidden_layers=6, num_key_value_heads=4)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.requires_grad_(False)
        if wanted:
            keep_less(model)
        states = torch.empty(8, 64, model.config.hidden_size, dtype=torch.bfloat16, device=META)
        with FakeDevice(), LiveMemory("meta", lambda: PhasePart("all", "all")) as memory:
            states.requires_grad_()
            model.base_model(inputs_embeds=states).last_hidden_state.sum().backward()
        peaks.append(memory.peak)
    assert peaks[1] < 0.8 * peaks[0]
