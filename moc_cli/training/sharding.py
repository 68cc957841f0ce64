"""A frozen base whose layers are split over the processes, by torch's FSDP2.

Each process keeps its part of every layer's weights. A layer's weights are gathered for its forward
pass, and again for its backward pass. All else is whole in every process: embeddings, head, and
what is trained, so that gradients, optimizer and checkpoints are those of one process.
"""

import warnings
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from moc_cli.errors import MocError
from moc_cli.models.quantization import of_model
from moc_cli.processes import Processes
from moc_cli.recipe.launch import LaunchSection


def splits(launch: LaunchSection, processes: Processes) -> bool:
    """Whether a training by these processes splits its base."""
    return launch.strategy == "fsdp2" and processes.world > 1


def check_sharding(model: PreTrainedModel) -> None:
    """Raise MocError where a model's layers cannot be split; its shapes suffice."""
    if not any(_layers(model)):
        raise MocError(
            f"launch.strategy: fsdp2 does not know the layers of {type(model).__name__}",
            "use --set launch.strategy=ddp",
        )
    quantization, stored = of_model(model), getattr(model.config, "quantization_config", None)
    if quantization is not None and (quantization.load_in_8bit or stored is not None):
        stored_in = "weights" if stored is None else "files"
        raise MocError(
            f"launch.strategy: fsdp2 does not split {stored_in} in {quantization}",
            "use --set launch.strategy=ddp, or an unquantised base with model.load_in_4bit",
        )


def shard_layers(model: PreTrainedModel, device: torch.device, processes: Processes) -> None:
    """Split the frozen weights of a model's layers over the processes, on their devices.

    Unless it is quantised the model may lie in host memory: each layer moves to the device before
    it is split.
    """
    layers = list(_layers(model))
    # Our hook returns a view, in which torch itself refuses to write.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (processes.world,))
    split = {p for _, layer in layers for p in layer.parameters() if not p.requires_grad}
    unsplit = {p for p in model.parameters() if p not in split}
    for _, layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=unsplit)
    for name in dict.fromkeys(_parent(name) for name, _ in layers):  # gathers a layer ahead
        fully_shard(model.get_submodule(name), mesh=mesh, ignored_params=unsplit)
    model.to(device)  # type: ignore[arg-type]


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            yield name, module


def _parent(layer: str) -> str:
    """The name of the module that runs a list of layers, of which one is named."""
    return layer.rpartition(".")[0].rpartition(".")[0]
