"""AdamW over the trainables, and learning rates as pure functions of the step."""

import math
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import Parameter

from moc_cli.errors import MocError

SCHEDULES = ("linear", "cosine", "constant")


def build_optimizer(
    named: dict[str, Parameter],
    no_decay: set[str],
    gate: Collection[str] = (),
    *,
    learning_rate: float,
    gate_learning_rate: float | None = None,
    weight_decay: float,
    betas: tuple[float, float],
    epsilon: float,
) -> torch.optim.AdamW:
    """Return AdamW; names in `no_decay` take no weight decay.

    Names in `gate` have `gate_learning_rate`, if there is one. A group's `initial_lr` is its peak
    rate, as torch's schedulers call it.
    """
    members: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in named.items():
        own_rate = gate_learning_rate if name in gate else None
        rate = learning_rate if own_rate is None else own_rate
        decay = 0.0 if name in no_decay else weight_decay
        members.setdefault((rate, decay), []).append(parameter)
    groups = [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in members.items()
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon)


def rate_factor(step: int, *, kind: str, total: int, warmup: int) -> float:
    """Return what the learning rate is multiplied by at `step` (from 0) of `total`.

    The numbers are those of transformers' schedules of the same names: with a warm-up the first
    step has rate 0, and the last one still has more than 0.
    """
    if kind not in SCHEDULES:
        raise MocError(f"unknown schedule {kind!r}; known: {', '.join(SCHEDULES)}")
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
            tensors[f"{name}.{key}"] = torch.as_tensor(value).detach().cpu().contiguous().clone()
    return tensors


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer, named: dict[str, Parameter], tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned.

    Raises MocError when a name or a shape fits no parameter.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in named:
            raise MocError(f"the optimizer state holds {full!r}, but no parameter has that name")
        if tensor.dim() and tensor.shape != named[name].shape:
            raise MocError(
                f"the optimizer state of {name!r} has shape {tuple(tensor.shape)}, "
                f"the parameter {tuple(named[name].shape)}"
            )
        states.setdefault(name, {})[key] = tensor
    names = {id(parameter): name for name, parameter in named.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    loaded = optimizer.state_dict()
    loaded["state"] = {i: states[name] for i, name in enumerate(order) if name in states}
    optimizer.load_state_dict(loaded)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the bytes of all tensors in the optimizer's state."""
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
