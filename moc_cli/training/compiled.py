"""torch.compile for the layers of a model, while it is trained."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

from moc_cli.models.compiler import compile_error
from moc_cli.nn.mixture import Mixture
from moc_cli.training.recompute import SELECTIVE

# Graphs of one layer's code, at most: the first layer's input needs no gradient, a short window has
# another scale of the loss, and kinds of layers may alternate.
GRAPHS = 64
_FUNCTION = "_gradient_checkpointing_func"  # with which transformers calls a layer


@contextmanager
def compiled_layers(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Within it each layer of a transformers model runs as one compiled graph, where `enabled`.

    Layers of the same kind share their graphs, which take any number of rows and tokens. Raises
    MocError where a layer cannot be compiled, as when Ctrl-C ends the compiler.
    """
    if not enabled:
        yield
        return
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    recomputing = _Recomputing(model)
    checkpointed = [layer for layer in layers if layer.gradient_checkpointing]
    functions: dict[GradientCheckpointingLayer, Any] = {
        layer: getattr(layer, _FUNCTION) for layer in checkpointed
    }
    for layer in layers:
        function: Any = functions.get(layer)
        if function is None or function is SELECTIVE:
            layer.gradient_checkpointing = False  # a compiled layer is selective by itself
            layer.compile(dynamic=True)
        else:
            vars(layer)[_FUNCTION] = partial(recomputing, function)
    try:
        # A number such as the loss's scale is read in the backward pass: it has to be a constant.
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, specialize_float=True):
            yield
    except TorchDynamoException as error:
        raise compile_error("train.torch_compile", "a layer", error) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
        for layer, function in functions.items():
            layer.gradient_checkpointing = True
            vars(layer)[_FUNCTION] = function


class _Recomputing:
    """Runs layers compiled, with what is recomputed around the compiled graph.

    The backward pass then runs the graph of the forward again.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mixtures = [part for part in model.modules() if isinstance(part, Mixture)]
        self._compiled = torch.compile(_call, dynamic=True)

    def __call__(self, recompute: Callable[..., Any], forward: partial[Any], *args: Any) -> Any:
        """Run a layer's forward with `recompute`, its function for activation checkpointing."""
        return recompute(partial(self._run, forward), *args)

    def _run(self, forward: partial[Any], *args: Any) -> Any:
        try:
            return self._compiled(forward.func, *forward.args, *args, **forward.keywords)
        finally:
            for mixture in self._mixtures:
                if mixture.current.ended:
                    mixture.current.end()  # what was recomputed is not to be kept


def _call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def matmul_precision(device: torch.device, *, tf32: bool) -> str:
    """Return how products of float32 matrices are made: `high` is TF32, which only GPUs have."""
    return "high" if tf32 and device.type == "cuda" else "highest"
