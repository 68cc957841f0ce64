"""The optimizers of `train.optim`: AdamW of torch, and of bitsandbytes with moments in 8 bits."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load, save
from support.messages import refused
from support.models import make_tiny
from support.tiny_runs import choices_run
from support.toy import ToyAdapted, toy_data, toy_fit

from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.methods import attach
from moc_cli.recipe.methods import METHODS
from moc_cli.recipe.schema import Recipe
from moc_cli.training import device_checks, optim
from moc_cli.training.checkpoint import Checkpoints, read_checkpoint
from moc_cli.training.device_checks import check_device_keys
from moc_cli.training.loop_types import Settings

PLAIN = Settings(learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.99))
SMALL = replace(PLAIN, optim="adamw_8bit")


def parameters(size: int) -> dict[str, torch.nn.Parameter]:
    """A large matrix, a gate, and a vector too small for 8 bits."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"large": (size, 64), "gates.shared": (size, 64), "small": (40,)}
    return {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}


def steps(named: dict[str, torch.nn.Parameter], optimizer, seeds: range) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for parameter in named.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("size", [64, 65])  # 65 x 64 does not fill its last block of 256
def test_8_bit_moments_resume_to_the_bit(size: int) -> None:
    named, other = parameters(size), parameters(size)
    whole = optim.build_optimizer(named, {"gates.shared"}, SMALL)
    steps(named, whole, range(3))
    saved = load(save(optim.optimizer_tensors(whole, named)))
    assert not any("qmap" in key for key in saved)
    for name, parameter in other.items():
        parameter.data.copy_(named[name])
    resumed = optim.build_optimizer(other, {"gates.shared"}, SMALL)
    optim.load_optimizer_tensors(resumed, other, saved)
    steps(named, whole, range(3, 6))
    steps(other, resumed, range(3, 6))
    assert all(torch.equal(named[name], other[name]) for name in named)
    assert optim.state_bytes(whole) == optim.state_bytes(resumed)


def test_8_bit_moments_take_a_quarter_and_follow_adamw() -> None:
    named, exact = parameters(256), parameters(256)
    gate = {"gates.shared"}
    small = optim.build_optimizer(named, gate, replace(SMALL, gate_learning_rate=0.002), gate)
    plain = optim.build_optimizer(exact, gate, replace(PLAIN, gate_learning_rate=0.002), gate)
    rates = [(group["lr"], group["weight_decay"]) for group in small.param_groups]
    assert rates == [(g["lr"], g["weight_decay"]) for g in plain.param_groups]
    assert {rate for rate, _ in rates} == {0.01, 0.002}
    start = {name: parameter.detach().clone() for name, parameter in exact.items()}
    steps(named, small, range(4))
    steps(exact, plain, range(4))
    state = {name: small.state[parameter]["state1"].dtype for name, parameter in named.items()}
    assert state == dict.fromkeys(("large", "gates.shared"), torch.uint8) | {"small": torch.float32}
    assert 0.24 < optim.state_bytes(small) / optim.state_bytes(plain) < 0.28
    for name, value in exact.items():
        moved, error = (value - start[name]).norm(), (value - named[name]).norm()
        assert error < 0.05 * moved, name
    assert torch.allclose(named["small"], exact["small"], atol=1e-6)


def test_a_scale_of_another_size_is_refused() -> None:
    named = parameters(64)
    optimizer = optim.build_optimizer(named, set(), SMALL)
    with refused(MocError):
        optim.load_optimizer_tensors(optimizer, named, {"large.absmax1": torch.ones(3)})


def test_a_resumed_loop_ends_as_the_whole_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit", _every_size_in_8_bits())
    settings = Settings(max_steps=6, optim="adamw_8bit", save_strategy="steps", save_steps=3)
    data = toy_data([[0, 1], [2, 3], [4]], shuffled=True)
    whole, again = ToyAdapted(dropout=0.2), ToyAdapted(dropout=0.2)
    toy_fit(tmp_path / "whole", whole, data, settings)
    middle = read_checkpoint(Checkpoints(tmp_path / "whole" / "checkpoints").path(3))
    assert middle.optimizer["head.weight.state1"].dtype == torch.uint8
    toy_fit(tmp_path / "again", again, data, replace(settings), resume=middle)
    assert all(torch.equal(whole.state()[name], value) for name, value in again.state().items())


def _every_size_in_8_bits():
    from bitsandbytes.optim import AdamW8bit

    return lambda groups, **options: AdamW8bit(groups, **options, min_8bit_size=1)


def recipe_with(**keys) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"model_name_or_path": "builtin:world-llama"} | keys.pop("model", {}),
            "data": {"suite": "builtin", "tasks": ["world"]},
            "output": {"output_dir": "run"},
            "train": keys,
        }
    )


@pytest.mark.parametrize("kind", ["adamw_fused", "paged_adamw_8bit"])
def test_an_optimizer_that_needs_a_gpu_is_refused_on_a_cpu(kind: str) -> None:
    recipe, cpu = recipe_with(optim=kind), torch.device("cpu")
    with refused(MocError):
        check_device_keys(recipe, cpu, training=True)
    check_device_keys(recipe, cpu, training=False)


def test_all_keys_that_cannot_be_honoured_are_named_at_once(monkeypatch) -> None:
    monkeypatch.setattr(device_checks, "has_bitsandbytes", lambda: False)
    monkeypatch.setattr(device_checks, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda emulated: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    flash = {"attn_implementation": "flash_attention_2"}
    recipe = recipe_with(model=flash, optim="adamw_8bit", bf16=True)
    with refused(MocError):
        check_device_keys(recipe, torch.device("cuda"), training=True)


def test_the_command_refuses_before_weights_load(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("moc_cli.training.build.load_model", None)
    arguments = [*choices_run(tmp_path), "--set", "train.optim=paged_adamw_8bit"]
    for command in (arguments, [*arguments, "--dry-run"]):
        assert run(command) == 2
        assert "train.optim: paged_adamw_8bit" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_from_before_a_key_was_there_resumes(tmp_path) -> None:
    from moc_cli.training.changes import check_recipe

    now = recipe_with().model_dump(mode="json")
    then = now | {"train": {key: value for key, value in now["train"].items() if key != "optim"}}
    assert check_recipe(then, now) == []
    fused = recipe_with(optim="adamw_fused").model_dump(mode="json")
    assert check_recipe(fused, now) == [
        "train.optim: adamw_fused -> adamw; results may differ in their last bits"
    ]
    with refused(MocError):
        check_recipe(then, recipe_with(optim="adamw_8bit").model_dump(mode="json"))


@pytest.mark.parametrize("gate_rate", [None, 0.003])
@pytest.mark.parametrize("name", METHODS)
def test_the_gate_learns_at_its_own_rate(name: str, gate_rate: float | None) -> None:
    """A first step of AdamW is as long as the rate."""
    method = METHODS[name](rank=4)
    adapted = attach(make_tiny("llama"), method, new_modules=(), seed=1)
    before = adapted.state()
    settings = Settings(learning_rate=0.01, gate_learning_rate=gate_rate, weight_decay=0)
    optimizer = optim.make_optimizer(adapted, settings)
    for parameter in adapted.named_trainables().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for key, value in adapted.state().items():
        rate = gate_rate or 0.01 if key.startswith("gates.") else 0.01
        assert torch.allclose(before[key] - value, torch.tensor(rate), rtol=1e-3), key
    rates = {group["initial_lr"] for group in optimizer.param_groups}
    assert rates == {0.01} | ({gate_rate} if gate_rate and "mo" in name else set())
