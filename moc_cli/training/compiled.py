"""torch.compile for the layers of a model, while it is trained."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils._triton import has_triton
from transformers.modeling_layers import GradientCheckpointingLayer

from moc_cli.errors import MocError
from moc_cli.recipe.schema import Recipe

# Graphs of one layer's code, at most: the first layer's input needs no gradient, lengths become
# variable after the second one, and kinds of layers may alternate.
GRAPHS = 64
COMPILERS = ("g++", "clang++")


def compile_problems(recipe: Recipe, device: torch.device) -> list[str]:
    """Say why `train.torch_compile` cannot be honoured on a device."""
    if not recipe.train.torch_compile:
        return []
    if device.type == "cuda" and not has_triton():
        return [
            "train.torch_compile needs the package triton, which is not installed; leave it out"
        ]
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        return [f"train.torch_compile needs a C++ compiler on the CPU ({' or '.join(COMPILERS)})"]
    return []


@contextmanager
def compiled_layers(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Within it each layer of a transformers model runs as one compiled graph, where `wanted`.

    Layers of the same kind share their graphs. Raises MocError where a layer cannot be compiled, as
    when Ctrl-C ends the compiler.
    """
    if not wanted:
        yield
        return
    layers = [part for part in model.modules() if isinstance(part, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile()
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS):
            yield
    except TorchDynamoException as error:
        reason = next(line for line in [*str(error).splitlines(), "no reason given"] if line)
        raise MocError(
            f"train.torch_compile: a layer could not be compiled: {reason}",
            "leave it out: --set train.torch_compile=false",
        ) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


def matmul_precision(recipe: Recipe, device: torch.device) -> str:
    """Return how products of float32 matrices are made: `high` is TF32, which only GPUs have."""
    return "high" if recipe.train.tf32 and device.type == "cuda" else "highest"
