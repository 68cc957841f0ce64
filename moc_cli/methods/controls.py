"""The methods that add controls: Mixture-of-Control (`moc`) and Parallel Control (`control`)."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from moc_cli.errors import FamilyError, MocError
from moc_cli.methods.adapted import Placed
from moc_cli.methods.size import check_size, one_device
from moc_cli.models.families import find_family
from moc_cli.models.hooks import HookedModel, describe_layers, find_layers
from moc_cli.models.placement import Place, Placement
from moc_cli.nn.mixture import Mixture
from moc_cli.nn.routing import Routing
from moc_cli.recipe.methods import ControlMethod, MocMethod


class ControlsMethod(Placed):
    """A mixture of controls in its model."""

    mixture: Mixture

    def __init__(self, model: PreTrainedModel, method: MocMethod | ControlMethod, seed: int):
        self._method = method
        self.mixture, placement = make_mixture(model, method, seed)
        self._placement = placement
        self._hooked = HookedModel(model, self.mixture, placement)
        self.tracker = self._hooked.tracker

    def named_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.mixture.named_parameters())

    def config(self) -> dict[str, Any]:
        placement = asdict(self._placement)
        if not self._placement.multiplier:
            del placement["multiplier"]
        return {"method": self._method.model_dump(mode="json"), "placement": placement}

    def detach(self) -> None:
        self._hooked.remove()


def make_mixture(
    model: PreTrainedModel, method: MocMethod | ControlMethod, seed: int, *, empty: bool = False
) -> tuple[Mixture, Placement]:
    """The controls and gates that fit a model, on its device, and where they belong in it.

    With `empty` they are on the meta device, for numbers that are loaded later.
    """
    placement = _placement(model, method)
    try:
        routing = _routing(method)
    except ValueError as error:  # kinds that exclude each other
        raise MocError(f"method.{error}") from error
    blocks = ("attn", "ffn") if method.sites == "attn+ffn" else (method.sites,)
    layers = find_layers(model, placement)
    _check(model, routing, blocks, len(layers))
    check_size(model, method.rank)
    device = torch.device("meta") if empty else one_device(layers)
    mixture = Mixture(
        len(layers),
        model.config.get_text_config().hidden_size,
        blocks,
        method.rank,
        method.scale / _multiplier(model, placement, layers[0]),
        routing,
        generator=torch.Generator().manual_seed(seed),
        device="meta" if device.type == "meta" else "cpu",
    ).to(device)
    mixture.train(model.training)
    return mixture, placement


def _routing(method: MocMethod | ControlMethod) -> Routing:
    """The recipe's section as flat numbers; Control is K = 0."""
    if isinstance(method, ControlMethod):
        return Routing(top_k=0)
    return Routing(
        top_k=method.top_k,
        alpha=method.alpha,
        share_gate=method.share_gate,
        gate=method.gate.kind,
        projection_dim=method.gate.projection_dim,
        estimator=method.gate.estimator,
        level=method.routing.level,
        vote=method.routing.vote,
        exclude_local=method.routing.exclude_local,
        decode=method.routing.decode,
        sync=method.routing.sync,
        balance_weight=method.balance.weight,
        balance_f=method.balance.f,
        balance_reduce=method.balance.reduce,
    )


def _placement(model: PreTrainedModel, method: MocMethod | ControlMethod) -> Placement:
    place = method.placement
    if place is None:
        return find_family(model.config.model_type, describe_layers(model)).placement
    return Placement(
        layers=place.layers,
        attn=Place(place.attn.read, place.attn.write),
        ffn=Place(place.ffn.read, place.ffn.write),
        causal=place.causal,
        multiplier=place.multiplier or "",
    )


def _multiplier(model: PreTrainedModel, placement: Placement, layer: nn.Module) -> float:
    """What the model multiplies a block's output with before it adds it to the residual stream.

    The place names a value of the config or, where the model computes it, an attribute of a layer.
    """
    config = model.config.get_text_config()
    if placement.multiplier:
        value = getattr(config, placement.multiplier, vars(layer).get(placement.multiplier))
        if isinstance(value, float | int) and value:
            return float(value)
        raise FamilyError(
            f"placement: multiplier '{placement.multiplier}' is {value!r} in the config of "
            f"{type(model).__name__}; it must be a number other than 0"
        )
    usual = {"residual_multiplier": getattr(config, "residual_multiplier", 1.0)} | vars(layer)
    for name, value in usual.items():
        if "residual" in name and type(value) in (int, float) and value != 1.0:
            raise FamilyError(
                f"placement: this model multiplies each block's output by {name} = {value}, and "
                "its control would need the same factor",
                hint=f"Add method.placement.multiplier: {name}.",
            )
    return 1.0


def _check(model: PreTrainedModel, routing: Routing, blocks: tuple[str, ...], layers: int) -> None:
    """Refuse what cannot work before anything is placed."""
    pool = layers * (len(blocks) if routing.share_gate else 1)
    allowed = pool - routing.exclude_local
    if routing.top_k > allowed:
        minus = " less the local one" if routing.exclude_local else ""
        raise MocError(
            f"method.top_k: {routing.top_k} routed controls of a pool of {pool} controls{minus}; "
            f"at most {allowed}"
        )
    if getattr(model.config, "chunk_size_feed_forward", 0):
        raise FamilyError(
            f"chunk_size_feed_forward = {model.config.chunk_size_feed_forward}: the FFN would see "
            "parts of a row, and each part would vote alone; set it to 0"
        )
