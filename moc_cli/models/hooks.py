"""Place a mixture of controls in a model by hooks at its sites.

Hooks are bound methods of plain objects, so that a
deep copy or a pickle of the model keeps its own controls.
"""

from contextlib import AbstractContextManager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moc_cli.errors import FamilyError
from moc_cli.models.families import Family
from moc_cli.models.generation import Passes
from moc_cli.nn.mixture import Mixture, Pass


class _Remember(torch.autograd.Function):
    """Identity on a layer's output; its backward restores the pass for the recomputed layer.

    Without it, two forwards before one backward would recompute the first with the mask of the
    second under activation checkpointing.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, mixture: Mixture, current: Pass) -> Tensor:
        ctx.mixture, ctx.current = mixture, current
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):
        ctx.mixture.current = ctx.current
        return grad, None, None


class Host:
    """A model with a mixture placed in it: hooks at every site, and around each forward.

    The mixture becomes the model's submodule `moc`, unless it is `held` elsewhere in the model.
    """

    def __init__(
        self, model: PreTrainedModel, mixture: Mixture, family: Family, *, held: bool = False
    ) -> None:
        self.model = model
        self.mixture = mixture
        layers = find_layers(model, family)
        places = [
            (site, family.port(site.block), layers[site.layer]) for site in mixture.sites
        ]  # all paths are resolved by find_layers before the first hook is registered
        self._held = held
        if not held:
            model.add_module("moc", mixture)
        self._handles = []
        for site, port, layer in places:
            read, write = layer.get_submodule(port.read), layer.get_submodule(port.write)
            self._handles.append(read.register_forward_pre_hook(site.read, with_kwargs=True))
            self._handles.append(write.register_forward_hook(site.write))
        for layer in layers:
            self._handles.append(layer.register_forward_hook(self._after_layer))
        self.passes = Passes(
            model,
            mixture,
            causal=family.causal,
            new_store=mixture.new_store,
            running=mixture.routing.decode == "running",
            runner=find_runner(model, family),
        )

    def remove(self) -> None:
        """Take every hook and the mixture out of the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.passes.remove()
        if not self._held:
            del self.model.moc

    def voting(self, mask: Tensor) -> AbstractContextManager[None]:
        """Within it, the tokens of mask (B, T) vote, whatever the attention mask says."""
        return self.passes.voting(mask)

    def _after_layer(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Hook of a layer, outside its activation checkpoint."""
        hidden = output[0] if isinstance(output, tuple) else output
        if not (self.mixture.training and torch.is_grad_enabled() and hidden.requires_grad):
            return output
        hidden = _Remember.apply(hidden, self.mixture, self.mixture.current)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def cast_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of a module that is kept in float32 in a base of another type."""
    dtype = next(module.parameters()).dtype
    return tuple(
        arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def find_list(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The model's list of layers; raises FamilyError naming the lists that it has."""
    base = model.base_model
    try:
        layers = base.get_submodule(family.layers)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        raise FamilyError(
            f"placement: layers '{family.layers}' is not a list of layers of "
            f"{type(base).__name__}; it has: {describe_layers(model) or 'none'}"
        )
    return layers


def find_layers(model: PreTrainedModel, family: Family) -> nn.ModuleList:
    """The model's layers; raises FamilyError naming every place in them that does not exist."""
    layers = find_list(model, family)
    missing = []
    for number, layer in enumerate(layers):
        known = {name for name, _ in layer.named_modules()}
        for block, port in (("attn", family.attn), ("ffn", family.ffn)):
            for end in ("read", "write"):
                path = getattr(port, end)
                if path not in known:
                    missing.append(f"{block}.{end} '{path}' (layer {number})")
    if missing:
        raise FamilyError(
            f"placement: {type(model.base_model).__name__} has no {'; no '.join(missing[:4])}",
            hint=f"A layer of it holds: {_parts(layers[0])}",
        )
    return layers


def find_runner(model: PreTrainedModel, family: Family) -> nn.Module:
    """The innermost module around the layers that takes token ids and their mask.

    As a rule that is the base model; but OPT's head calls the base's decoder past the base.
    """
    path = family.layers
    while "." in path:
        path = path.rpartition(".")[0]
        module = model.base_model.get_submodule(path)
        if {"input_ids", "attention_mask"} <= signature(module.forward).parameters.keys():
            return module
    return model.base_model


def describe_layers(model: PreTrainedModel) -> str:
    """The lists of layers in a model's base, and the modules in the first layer of each."""
    return "; ".join(
        f"{name} ({len(found)} x {type(found[0]).__name__}: {_parts(found[0])})"
        for name, found in model.base_model.named_modules()
        if isinstance(found, nn.ModuleList) and len(found) and _parts(found[0])
    )


def _parts(layer: nn.Module) -> str:
    return ", ".join(name for name, _ in layer.named_modules() if name and name.count(".") < 2)
