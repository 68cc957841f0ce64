"""One of several processes that train together: its memory and what it sends, from those of one
process alone."""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from moc_cli.models.fingerprint import in_a_layer
from moc_cli.planning.footprint import Footprint
from moc_cli.planning.links import FLOAT, Traffic, all_gather, all_reduce
from moc_cli.processes import current
from moc_cli.recipe.methods import MocMethod
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build
from moc_cli.training.recompute import recompute_mode

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
    requested, running = recipe.launch.num_processes, current().world
    return Launch(
        running if running > 1 or requested == "auto" else requested, recipe.launch.strategy
    )


def in_one_of(alone: Footprint, model: PreTrainedModel, launch: Launch) -> Footprint:
    """Return what one process takes; `model` are the base's shapes.

    All keep the trainables whole, and a buffer through which the gradients are summed.
    """
    if launch.processes == 1:
        return alone
    saved_bytes = 0
    if launch.strategy == "fsdp2":
        inside, layers = _bytes_in_layers(alone, model), _layers(model)
        held_bytes = inside / launch.processes + inside * min(GATHERED, layers) / layers
        saved_bytes = round(inside - held_bytes)
    buffer = {"buffer": FLOAT * alone.trained}
    phases = {
        phase: parts | {"weights": parts["weights"] - saved_bytes} | buffer
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


def votes_of(recipe: Recipe, model: PreTrainedModel, launch: Launch) -> Traffic:
    """Return what each process sends in a step so that all vote together (method.routing.sync).

    A site joins its controls' mean probabilities and picks, and the number of voters; their
    gradients travel too, and what layers that are recomputed vote again.
    """
    method, votes = recipe.method, Traffic(0, 0)
    if launch.processes == 1 or not (isinstance(method, MocMethod) and method.routing.sync):
        return votes
    mixture = build.place_in_shapes(recipe, model).mixture
    pools = [] if mixture is None else [site.pool for site in mixture.sites]
    for pool in pools:
        votes += all_reduce(FLOAT * (2 * pools.count(pool) + 1), launch.processes)
    passes = 2 if recompute_mode(recipe) == "none" else 3
    return votes.times(passes * recipe.train.gradient_accumulation_steps)


def _bytes_in_layers(alone: Footprint, model: PreTrainedModel) -> int:
    """Return the bytes of the layers' weights; embeddings and head are not sharded."""
    outside = sum(p.nbytes for name, p in model.named_parameters() if not in_a_layer(name))
    return max(0, alone.parts["weights"] - outside)


def _layers(model: PreTrainedModel) -> int:
    layers: int = model.config.get_text_config().num_hidden_layers
    return layers
