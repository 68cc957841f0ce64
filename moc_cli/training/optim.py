"""AdamW over the trainables, and learning rates as pure functions of the step.

AdamW is torch's, or that of bitsandbytes with its moments in 8 bits, a scale for each block of 256
numbers; bitsandbytes keeps those of parameters with fewer than 4,096 numbers in 32 bits.
"""

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from moc_cli.errors import MocError
from moc_cli.methods import Adapted
from moc_cli.models.quantization import import_bitsandbytes
from moc_cli.training.loop_types import Settings
from moc_cli.training.memory import tensor_bytes

BLOCK = 256  # numbers that share a scale in the moments of bitsandbytes
# The maps from 8 bits to numbers, the same for every parameter: they are not saved.
_MAPS = {"qmap1": "dynamic", "qmap2": "udynamic"}


def make_optimizer(adapted: Adapted, settings: Settings) -> torch.optim.Optimizer:
    """Return the optimizer of a run; `build_optimizer` says of what."""
    named = adapted.named_trainables()
    no_decay = {name for name in named if adapted.no_decay(name)}
    in_gate = {name for name in named if adapted.in_gate(name)}
    return build_optimizer(named, no_decay, settings, in_gate)


def build_optimizer(
    named: dict[str, Parameter],
    no_decay: set[str],
    settings: Settings,
    in_gate: Container[str] = (),
) -> torch.optim.Optimizer:
    """Return AdamW of a kind of `train.optim`; names in `no_decay` take no weight decay.

    Names in `in_gate` learn at the gate's rate, where the settings have one. A group's
    `initial_lr` is its peak rate, as torch's schedulers call it.
    """
    members: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in named.items():
        rate = settings.learning_rate
        if name in in_gate and settings.gate_learning_rate is not None:
            rate = settings.gate_learning_rate
        decay = 0.0 if name in no_decay else settings.weight_decay
        members.setdefault((rate, decay), []).append(parameter)
    groups = [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in members.items()
    ]
    kind, rate = settings.optim, settings.learning_rate
    options: dict[str, Any] = {"lr": rate, "betas": settings.betas, "eps": settings.epsilon}
    if kind == "adamw":
        return torch.optim.AdamW(groups, **options)
    if kind == "adamw_fused":
        return torch.optim.AdamW(groups, **options, fused=True)
    optimizers = import_bitsandbytes().optim
    if kind == "adamw_8bit":
        optimizer = optimizers.AdamW8bit(groups, **options)
    else:
        optimizer = optimizers.PagedAdamW8bit(groups, **options)
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def rate_factor(step: int, *, kind: str, total: int, warmup: int) -> float:
    """Return what the learning rate is multiplied by at `step` (from 0) of `total`, for a `kind`
    of `train.lr_scheduler_type`.

    The numbers are those of transformers' schedules of the same names: with a warm-up the first
    step has rate 0, and the last one still has more than 0.
    """
    if step < warmup:
        return step / max(1, warmup)
    if kind == "constant":
        return 1.0
    share = (step - warmup) / max(1, total - warmup)
    if kind == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * share)))
    return max(0.0, 1.0 - share)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: dict[str, Parameter]
) -> dict[str, Tensor]:
    """Return the optimizer's state as `<parameter>.<key>` -> contiguous CPU tensor."""
    tensors = {}
    for name, parameter in named.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if key not in _MAPS:
                value = torch.as_tensor(value).detach().cpu().contiguous().clone()
                tensors[f"{name}.{key}"] = value
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: dict[str, Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned.

    Raises MocError when a name or a shape fits no parameter.
    """
    states: dict[str, dict[str, Any]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in named:
            raise MocError(f"the optimizer state holds {full!r}, but no parameter has that name")
        shape, parameter = tuple(tensor.shape), named[name]
        blocks = (math.ceil(parameter.numel() / BLOCK),)
        if tensor.dim() and shape != (blocks if key.startswith("absmax") else parameter.shape):
            raise MocError(
                f"the optimizer state of {name!r} has shape {shape}, "
                f"the parameter {tuple(parameter.shape)}"
            )
        counted = tensor.dim() == 0 and not tensor.is_floating_point()  # steps of bitsandbytes
        states.setdefault(name, {})[key] = int(tensor) if counted else tensor
    names = {id(parameter): name for name, parameter in named.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    loaded = optimizer.state_dict()
    loaded["state"] = {i: states[name] for i, name in enumerate(order) if name in states}
    optimizer.load_state_dict(loaded)
    maps = getattr(optimizer, "name2qmap", {})
    for parameter in named.values():
        state = optimizer.state.get(parameter, {})
        if "absmax1" in state:
            state |= {key: maps[name].to(parameter.device) for key, name in _MAPS.items()}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in the optimizer's state."""
    states = optimizer.state.values()
    return tensor_bytes(v for state in states for v in state.values() if isinstance(v, Tensor))
