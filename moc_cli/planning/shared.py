"""One of several processes that train together: its memory and what it sends, from those of one
process alone."""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from moc_cli.models.fingerprint import in_a_layer
from moc_cli.planning.footprint import Footprint
from moc_cli.planning.links import FLOAT, Traffic, all_gather, all_reduce
from moc_cli.processes import current
from moc_cli.recipe.schema import Recipe

# Layers whose weights fsdp2 holds whole at a time: the one in use, the next one on its way, and
# what the last one came in.
GATHERED = 3
GATHERINGS = 2  # of a layer in a micro-batch: for its forward and for its backward pass


@dataclass(frozen=True)
class Launch:
    """How many processes train together, and what each keeps of the base: all of it (ddp), or its
    share of each layer's weights (fsdp2).
    """

    processes: int = 1
    strategy: str = "ddp"


def launch_of(recipe: Recipe) -> Launch:
    """Return the launch of a training that runs, or else the one that the recipe asks for, where
    `auto` counts as one process.
    """
    asked, running = recipe.launch.num_processes, current().world
    return Launch(running if running > 1 or asked == "auto" else asked, recipe.launch.strategy)


def in_one_of(alone: Footprint, model: PreTrainedModel, launch: Launch) -> Footprint:
    """Return what one process takes; `model` are the base's shapes.

    All keep the trainables whole, and a buffer through which the gradients are summed.
    """
    if launch.processes == 1:
        return alone
    less = 0
    if launch.strategy == "fsdp2":
        inside, layers = _bytes_in_layers(alone, model), _layers(model)
        kept = inside / launch.processes + inside * min(GATHERED, layers) / layers
        less = round(inside - kept)
    buffer = {"buffer": FLOAT * alone.trained}
    phases = {
        phase: parts | {"weights": parts["weights"] - less} | buffer
        for phase, parts in alone.phases.items()
    }
    return replace(alone, phases=phases)


def traffic_of(
    alone: Footprint, model: PreTrainedModel, micro_batches: int, launch: Launch
) -> Traffic:
    """Return what each process sends in a step of so many micro-batches of its own."""
    traffic = all_reduce(FLOAT * alone.trained, launch.processes)
    if launch.strategy == "fsdp2":
        layers = _layers(model)
        layer = round(_bytes_in_layers(alone, model) / layers)
        gathered = all_gather(layer, launch.processes)
        traffic += gathered.times(layers * GATHERINGS * micro_batches)
    return traffic


def _bytes_in_layers(alone: Footprint, model: PreTrainedModel) -> int:
    """Return the bytes of the layers' weights; embeddings and head are not sharded."""
    outside = sum(p.nbytes for name, p in model.named_parameters() if not in_a_layer(name))
    return max(0, alone.parts["weights"] - outside)


def _layers(model: PreTrainedModel) -> int:
    layers: int = model.config.get_text_config().num_hidden_layers
    return layers
