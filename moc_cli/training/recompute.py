"""Activation checkpointing: what the backward pass recomputes instead of keeping it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers import PreTrainedModel

from moc_cli.errors import MocError
from moc_cli.models.families import FAMILIES
from moc_cli.models.lean import keep_less
from moc_cli.recipe.schema import Recipe

aten = torch.ops.aten
# What `selective` keeps, beside attention. All else is cheap to redo.
_PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
}
_ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._flash_attention_forward.default,
    aten._efficient_attention_forward.default,
}


def recompute_mode(recipe: Recipe) -> str:
    """What a recipe asks for; `auto` is none where nobody has planned the run."""
    mode = recipe.train.activation_checkpointing
    return "none" if mode == "auto" else mode


def check_recompute(model: PreTrainedModel, mode: str) -> None:
    """Raise MocError where a model's layers cannot be recomputed; its shapes suffice."""
    if mode != "none" and not model.supports_gradient_checkpointing:
        raise MocError(
            f"train.activation_checkpointing: {type(model).__name__} cannot recompute its "
            f"layers, found {mode!r}",
            "use --set train.activation_checkpointing=none",
        )


def prepare_layers(model: PreTrainedModel, recipe: Recipe) -> None:
    """Let a model's layers keep for the backward pass what a recipe asks for, and no more.

    A compiler does the first part of that itself. Raises MocError where the model cannot do it.
    """
    if not recipe.train.torch_compile:
        keep_less(model)
    recompute_layers(model, recompute_mode(recipe))


def recompute_layers(model: PreTrainedModel, mode: str) -> None:
    """Let a model recompute its layers as `mode` says: none, selective, full or offload.

    Gradients stay the same. Where a family leaves nothing to keep, `selective` is `full`. The
    embeddings are not differentiated, as they are by transformers' own switch: nothing below the
    first trained parameter needs a gradient. Raises MocError where the model cannot do it.
    """
    if mode == "none":
        return
    check_recompute(model, mode)
    family = FAMILIES.get(model.config.model_type)
    if mode == "selective" and family is not None and family.writes_into_products:
        mode = "full"
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=_FUNCTIONS[mode])


def _offloading(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a layer with its input in host memory until the backward pass needs it."""
    with saved_tensors_hooks(_to_host, _from_host):
        return checkpoint(function, *args, use_reentrant=False, **kwargs)


def _to_host(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    """Copy a tensor of a device to pinned memory, without waiting for it.

    What all layers share, such as a mask, has no gradient and stays. The copy back runs on the
    same stream, so it comes after this one.
    """
    if tensor.device.type == "cpu" or not tensor.requires_grad:
        return tensor
    pinned = torch.cuda.is_available()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
    return tensor.device, host.copy_(tensor.detach(), non_blocking=True)


def _from_host(packed: Tensor | tuple[torch.device, Tensor]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)


def _keep(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    must_save = operator in _ATTENTION or (operator in _PRODUCTS and not _is_cheap(args))
    return CheckpointPolicy.MUST_SAVE if must_save else CheckpointPolicy.PREFER_RECOMPUTE


def _is_cheap(args: tuple[Any, ...]) -> bool:
    """Whether a product takes few operations for each number of a wide result, as the second of a
    low-rank update does: it is done again.
    """
    *_, inner, columns = next(arg for arg in reversed(args) if isinstance(arg, Tensor)).shape
    return bool(8 * inner <= columns)


SELECTIVE = partial(
    checkpoint,
    use_reentrant=False,
    context_fn=partial(create_selective_checkpoint_contexts, _keep),
)
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "selective": SELECTIVE,
    "full": partial(checkpoint, use_reentrant=False),
    "offload": _offloading,
}
