"""Options of `moc` and `control` in whole models, against what they say."""

import pytest
import torch
from support.models import KINDS_OF_DECODERS, all_float64, make_batch, make_tiny, train_controls

from moc_cli.methods import Adapted, attach
from moc_cli.nn.control import INPUT_NORMS
from moc_cli.recipe.methods import ControlMethod, MocMethod

OPTIONS = {
    "rms": {"input_norm": "rms"},
    "learned alpha": {"alpha": "learned"},
}


def make(family: str, dtype: torch.dtype = torch.float64, **options) -> Adapted:
    fields = {"rank": 4, "alpha": 0.6, "gate": {"projection_dim": 8}} | options
    method = MocMethod.model_validate(fields)
    adapted = attach(make_tiny(family, dtype=dtype), method, new_modules=(), seed=1)
    train_controls(adapted.named_trainables())
    adapted.model.eval().generation_config.eos_token_id = None
    return adapted


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("family", KINDS_OF_DECODERS)
def test_a_generation_with_a_cache_is_that_without(family: str, name: str) -> None:
    asked = {"min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    asked |= {"output_logits": True, "return_dict_in_generate": True}
    with all_float64():
        adapted, batch = make(family, **OPTIONS[name]), make_batch(4, "left")
        cached = adapted.model.generate(**batch, **asked)
        whole = adapted.model.generate(**batch, **asked, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    for ours, theirs in zip(cached.logits, whole.logits, strict=True):
        assert (ours - theirs).abs().max() < 1e-9


def test_a_normed_state_has_one_size_and_no_other_type() -> None:
    """In float16 the squares of such states are beyond the largest number."""
    x = 2000 * torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        read = INPUT_NORMS["rms"](x.to(dtype))
        assert read.dtype == torch.float32
        assert torch.allclose(read.square().mean(-1), torch.ones(3, 5), atol=1e-5)
    assert torch.equal(INPUT_NORMS["rms"](torch.zeros(2, 4)), torch.zeros(2, 4))


def test_a_control_of_normed_states_does_not_grow_with_them() -> None:
    method = ControlMethod(rank=4, input_norm="rms")
    adapted = attach(make_tiny("llama", dtype=torch.float64), method, new_modules=(), seed=1)
    train_controls(adapted.named_trainables())
    mixture = adapted.mixture.double()
    site, x = mixture.sites[2], torch.randn(2, 3, 32, dtype=torch.float64)
    ours, large = mixture.update(site, x), mixture.update(site, 100 * x)
    control = mixture.control(site.index)
    size = x.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(ours, x @ control.A.T @ control.B.T / size, atol=1e-12)
    assert torch.allclose(ours, large, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_learned_alpha_begins_as_the_fixed_one(top_k: int) -> None:
    method = {"rank": 4, "top_k": top_k, "gate": {"projection_dim": 8}}
    answers = []
    for alpha in ({"alpha": 0.7}, {"alpha": "learned", "alpha_start": 0.7}):
        section = MocMethod.model_validate(method | alpha)
        adapted = attach(make_tiny("llama"), section, new_modules=(), seed=1)
        controls = {n: p for n, p in adapted.named_trainables().items() if n.endswith(".B")}
        train_controls(controls)
        with torch.no_grad():
            answers.append(adapted.model(**make_batch(4, "left")).logits)
    assert torch.allclose(*answers, atol=1e-5)
    named = adapted.named_trainables()
    own = named["alpha.logits"]
    assert own.shape == (4,)
    assert adapted.no_decay("alpha.logits")
    assert adapted.in_gate("alpha.logits")


def test_without_routes_no_alpha_is_learned() -> None:
    section = MocMethod(rank=4, top_k=0, alpha="learned")
    named = attach(make_tiny("llama"), section, new_modules=(), seed=1).named_trainables()
    assert {name.split(".")[0] for name in named} == {"controls"}
