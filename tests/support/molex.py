"""MoLEx in tiny models with sharp gates, and its reference on the same parameters."""

from typing import Any

import torch
from support.layers import Reference, mixture, write_lora
from support.models import make_tiny
from torch import Tensor, nn

from moc_cli.methods import Adapted, attach
from moc_cli.recipe.methods import MolexMethod

RANK, ALPHA = 4, 8
THREE = ["sliding_attention", "full_attention", "sliding_attention"]
MIXED = ("qwen2", "qwen3", "gemma2", "gemma3_text", "gemma3", "modernbert")


def molex(**changes: Any) -> MolexMethod:
    section = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "gate": {"projection_dim": 8}}
    return MolexMethod.model_validate(section | {"weight": 0.6} | changes)


def bare(family: str, dtype=torch.float64, layers: int = 3) -> nn.Module:
    """Three layers, of two types where the family has types."""
    changes = {"num_hidden_layers": layers}
    if family in MIXED:
        changes["layer_types"] = THREE[:layers]
    return make_tiny(family, dtype=dtype, **changes)


def train(adapted: Adapted, seed: int = 12) -> Adapted:
    """Draw B and the gate, and make the gate sharp, so that rows take different routes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_trainables().items():
            if name.endswith("lora_B.weight"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("log_temperature"):
                parameter.fill_(4.0)
            elif name.startswith("gates."):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return adapted


def make(family: str, method=None, dtype=torch.float64, **changes) -> Adapted:
    return train(attach(bare(family, dtype, **changes), method or molex(), seed=1))


def expect(family: str, adapted: Adapted, batch: dict[str, Tensor], **options) -> Reference:
    """The reference on the same parameters; gradients reach those of `adapted`."""
    parameters = adapted.named_trainables()
    model = bare(family)
    write_lora(model, parameters, ALPHA / RANK)
    gate = {
        name.removeprefix("gates.shared."): value
        for name, value in parameters.items()
        if name.startswith("gates.")
    }
    kind = "cosine" if "experts" in gate else "linear"
    weight = 0.6
    if "weight_logits" in parameters:
        odds = parameters["weight_logits"].exp()
        weight = odds[0] / (odds[0] + odds[1])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    return mixture(model, ids, mask, gate, kind=kind, weight=weight, **options)
