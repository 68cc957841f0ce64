"""Hooks that place controls in a model, and the paths that they are registered at.

Hooks are bound methods of plain objects, so that a deep copy or a pickle of the model keeps its own
controls.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from moc_cli.errors import FamilyError, MocError
from moc_cli.models.generation import GenerationTracker
from moc_cli.models.placement import Place, Placement
from moc_cli.nn.base import MixtureBase
from moc_cli.nn.forward import Forward
from moc_cli.nn.mixture import Mixture


class Adds(Protocol):
    """What adds an update to a block's output at one of its sites."""

    def add(self, site: Any, x: Tensor, output: Tensor) -> Tensor: ...


@dataclass(eq=False)
class BlockHook:
    """Reads the input x_t of one block, and lets `owner` add to the block's output."""

    owner: Adds
    site: Any
    _input: Tensor | None = None

    def register(self, layer: nn.Module, place: Place) -> list[RemovableHandle]:
        """Register both hooks at a place of a layer."""
        read, write = (find_module(layer, paths) for paths in (place.read, place.write))
        assert read is not None  # `find_layers` has found both
        assert write is not None
        return [
            read.register_forward_pre_hook(self._read, with_kwargs=True),
            write.register_forward_hook(self._write),
        ]

    def _read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = args[0] if args else kwargs["hidden_states"]

    def forget(self) -> None:
        """Let go of an input without an output."""
        self._input = None

    def _write(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x, self._input = self._input, None
        if x is None:
            raise RuntimeError(f"{self.site}: the block's output came before its input")
        if isinstance(output, tuple):
            return (self.owner.add(self.site, x, output[0]), *output[1:])
        return self.owner.add(self.site, x, output)


class _RememberForward(torch.autograd.Function):
    """Identity on a layer's output; its backward restores the forward for the recomputed layer.

    Without it, two forwards before one backward would recompute the first with the mask of the
    second under activation checkpointing.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mixture: Mixture, current: Forward) -> Tensor:
        ctx.mixture, ctx.current = mixture, current
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.mixture.current = ctx.current
        return grad, None, None


@dataclass(eq=False)
class FollowLoss:
    """Scales the balance loss as the model's own loss is scaled, by what its backward pass shows.

    That is the gradient that the loss receives, 1/n from a trainer that accumulates n
    micro-batches; and where the loss was divided by the labels of all of them, this batch's share.
    """

    mixture: MixtureBase

    def register(self, model: nn.Module) -> RemovableHandle:
        return model.register_forward_hook(self._after_forward, with_kwargs=True)

    def _after_forward(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        """Hook of the whole model; MocError where a trainer computes the loss by itself."""
        mixture = self.mixture
        if not (mixture.training and torch.is_grad_enabled() and mixture.loss_scale is None):
            return
        current, labels = mixture.current, kwargs.get("labels")
        items = kwargs.get("num_items_in_batch")
        loss = output[0] if isinstance(output, tuple) else getattr(output, "loss", None)
        log_probs = getattr(output, "log_probs", None)  # TRL's: its trainer makes the mean of them
        if log_probs is not None:
            mask = output.label_mask
            _when_known(
                log_probs, lambda grad: setattr(current, "loss_scale", -(grad * mask).sum())
            )
        elif labels is not None and loss is not None:
            share = 1.0 if items is None else _count(module, labels, kwargs) / items
            _when_known(loss, lambda grad: setattr(current, "loss_scale", grad * share))
        elif labels is not None or items is not None:
            raise MocError(
                "the trainer computes the loss by itself, so that its scale is not known to the "
                "balance loss",
                "call set_loss_scale(1 / gradient_accumulation_steps) before training",
            )


def _count(module: nn.Module, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """How many labels of a batch are learned, as the Trainer counts them."""
    next_tokens = labels.ndim > 1 and module.can_generate()  # type: ignore[operator]
    counted: Tensor = kwargs.get("shift_labels", labels[..., 1:] if next_tokens else labels)
    return counted.ne(-100).sum()


def _when_known(value: Tensor, keep: Callable[[Tensor], None]) -> None:
    """Call `keep` with the gradient that a tensor receives; the gradient stays as it is."""
    if value.requires_grad:
        value.register_hook(lambda grad: keep(grad.detach()))


class HookedModel:
    """A model with a mixture placed in it: hooks at every site, and around each forward.

    The mixture becomes the model's submodule `moc`; not with `register` false, where another module
    of the model holds it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mixture: Mixture,
        placement: Placement,
        *,
        register: bool = True,
    ) -> None:
        self.model = model
        self.mixture = mixture
        layers = find_layers(model, placement)  # resolves all paths before the first hook
        self._registered = register
        if register:
            model.add_module("moc", mixture)
        self._handles: list[RemovableHandle] = []
        self._blocks = [BlockHook(mixture, site) for site in mixture.sites]
        for hook in self._blocks:
            place = placement.place(hook.site.block)
            self._handles += hook.register(layers[hook.site.layer], place)
        for layer in layers:
            self._handles.append(layer.register_forward_hook(self._after_layer))
        if mixture.top_k and mixture.balance_weight:
            self._handles.append(FollowLoss(mixture).register(model))
        self.tracker = GenerationTracker(
            model,
            mixture,
            placement,
            new_store=mixture.new_store,
            running=mixture.routing.decode == "running",
            votes=mixture.routing.top_k > 0 and mixture.routing.level != "token",
            by_row=mixture.routing.level == "sample",
            fill=mixture.fill,
        )
        runner = self.tracker.runner  # whose hook of the tracker begins the forward, before these
        self._handles += [
            runner.register_forward_pre_hook(self._before_layers),
            runner.register_forward_hook(self._after_error, always_call=True),
        ]

    def remove(self) -> None:
        """Take every hook and the mixture out of the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.tracker.remove()
        if self._registered:
            del self.model.moc

    def _before_layers(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.mixture.prepare(self.model.dtype)

    def _after_error(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the module around the layers, called after an error in it too, then without an
        output: an input that waits for its block's output would keep the graph before it alive.
        """
        if output is None:
            for hook in self._blocks:
                hook.forget()

    def _after_layer(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook of a layer, outside its activation checkpoint."""
        if torch.compiler.is_compiling():
            return output  # a compiled layer's backward pass runs no Python
        hidden = output[0] if isinstance(output, tuple) else output
        if not (self.mixture.training and torch.is_grad_enabled() and hidden.requires_grad):
            return output
        hidden = _RememberForward.apply(  # type: ignore[no-untyped-call]
            hidden, self.mixture, self.mixture.current
        )
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def cast_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Pre-hook of a module that is kept in float32 in a base of another type."""
    dtype = next(module.parameters()).dtype
    return tuple(
        arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def find_list(model: PreTrainedModel, placement: Placement) -> nn.ModuleList:
    """The model's list of layers; raises FamilyError naming the lists that it has."""
    base = model.base_model
    try:
        layers = base.get_submodule(placement.layers)
    except AttributeError:
        layers = None
    if not isinstance(layers, nn.ModuleList):
        raise FamilyError(
            f"placement: layers '{placement.layers}' is not a list of layers of "
            f"{type(base).__name__}; it has: {describe_layers(model) or 'none'}"
        )
    return layers


def find_layers(model: PreTrainedModel, placement: Placement) -> nn.ModuleList:
    """The model's layers; raises FamilyError naming every place in them that does not exist."""
    layers = find_list(model, placement)
    missing: dict[str, int] = {}
    for number, layer in enumerate(layers):
        for block in ("attn", "ffn"):
            place = placement.place(block)
            for end, paths in (("read", place.read), ("write", place.write)):
                if find_module(layer, paths) is None:
                    path_list = " or ".join(f"'{path}'" for path in _listed(paths))
                    missing[f"{block}.{end} {path_list} (layer {number})"] = number
    if missing:
        first = next(iter(missing.values()))
        raise FamilyError(
            f"placement: {type(model.base_model).__name__} has no {'; no '.join([*missing][:4])}",
            hint=f"Layer {first} holds: {_parts(layers[first])}. Where layers differ, a placement "
            "names alternatives, as write: [self_attn, conv].",
        )
    return layers


def find_module(layer: nn.Module, paths: str | Sequence[str]) -> nn.Module | None:
    """The module at the first of the paths that a layer has; None where it has none of them."""
    for path in _listed(paths):
        try:
            return layer.get_submodule(path)
        except AttributeError:
            continue
    return None


def _listed(paths: str | Sequence[str]) -> Sequence[str]:
    return [paths] if isinstance(paths, str) else paths


def describe_layers(model: PreTrainedModel) -> str:
    """The lists of layers in a model's base, and the modules in the first layer of each."""
    return "; ".join(
        f"{name} ({len(module_list)} x {type(module_list[0]).__name__}: {_parts(module_list[0])})"
        for name, module_list in model.base_model.named_modules()
        if isinstance(module_list, nn.ModuleList) and len(module_list) and _parts(module_list[0])
    )


def _parts(layer: nn.Module) -> str:
    return ", ".join(name for name, _ in layer.named_modules() if name and name.count(".") < 2)
