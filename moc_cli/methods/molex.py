"""Mixture of Layer Experts: LoRA in every layer, and a second layer mixed into each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moc_cli.errors import FamilyError, MocError
from moc_cli.methods.adapted import Placed
from moc_cli.methods.low_rank import LowRank
from moc_cli.methods.size import one_device
from moc_cli.models.families import FAMILIES
from moc_cli.models.hooks import find_layers
from moc_cli.models.layer_mixing import LayerMixedModel
from moc_cli.models.placement import Placement
from moc_cli.nn.layer_mixture import LayerMixture
from moc_cli.recipe.methods import MolexMethod


class Molex(Placed):
    """LoRA through peft below, a mixture of layers above."""

    mixture: LayerMixture

    def __init__(self, model: PreTrainedModel, method: MolexMethod, seed: int) -> None:
        placement = _placement(model)
        layers = find_layers(model, placement)
        device = one_device(layers)
        mixed = _mixed_layers(method, len(layers))
        self._method = method
        self._placement = placement
        self.low_rank = LowRank(model, method, seed)
        self.mixture = LayerMixture(
            len(layers),
            model.config.get_text_config().hidden_size,
            weight=None if method.weight == "learned" else method.weight,
            start=method.weight_start,
            gate=method.gate.kind,
            projection_dim=method.gate.projection_dim,
            bias=method.gate.bias,
            vote=method.vote,
            balance_weight=method.balance.weight,
            generator=torch.Generator().manual_seed(seed),
            device="meta" if device.type == "meta" else "cpu",
        ).to(device)
        self.mixture.train(model.training)
        self._hooked = LayerMixedModel(model, self.mixture, placement, mixed)
        self.tracker = self._hooked.tracker

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return self.low_rank.named_parameters() | dict(self.mixture.named_parameters())

    def config(self) -> dict[str, Any]:
        """The method and its places; none of peft's fields, for peft would read LoRA alone."""
        return {
            "method": self._method.model_dump(mode="json"),
            "placement": {"layers": self._placement.layers, "causal": self._placement.causal},
        }

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.low_rank.disabled(), super().disabled():
            yield

    def detach(self) -> None:
        self._hooked.remove()
        self.low_rank.detach()


def _mixed_layers(method: MolexMethod, layers: int) -> set[int]:
    """The numbers of the layers that mix; raises MocError for one that the model lacks."""
    if method.mixed_layers is None:
        return set(range(layers))
    mixed = set(method.mixed_layers)
    lacking = sorted(number for number in mixed if number >= layers)
    if lacking:
        raise MocError(
            f"method.mixed_layers: the model has no layer {', '.join(map(str, lacking))}; its "
            f"layers are 0 to {layers - 1}"
        )
    return mixed


def _placement(model: PreTrainedModel) -> Placement:
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise FamilyError(
            f"molex needs to know where the layers are, and model_type '{model_type}' is not in "
            f"the table of families (known: {', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[model_type].placement
