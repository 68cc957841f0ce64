"""What one setting of a recipe takes: replayed with all layers, or with few and drawn out."""

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from moc_cli.errors import MocError
from moc_cli.methods import Adapted
from moc_cli.models.fingerprint import in_a_layer
from moc_cli.models.load import with_layers
from moc_cli.models.packing import attend_by_row
from moc_cli.models.quantization import linear_weights
from moc_cli.planning.batches import Work
from moc_cli.planning.cards import Card
from moc_cli.planning.evaluation import scoring_of
from moc_cli.planning.fake_device import META, Kernel
from moc_cli.planning.live_memory import highest
from moc_cli.planning.replay import StepMeasurement, replay
from moc_cli.recipe.quantization import Quantization
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build
from moc_cli.training.recompute import prepare_layers

# Layers of the replays from which a deeper model's numbers follow: where kinds of layers take
# turns, a longer one has one more of each. With a pool a third one: every site's gate keeps a
# number for each control, so that this part grows with the square of the layers.
FEW, FEW_WITH_POOL = (3, 5), (3, 5, 7)
# Bytes of a number in 4 bits, with a scale for 64 of them: in 8 bits, and one of 32 bits for 256
# scales, where those are quantised too.
FOUR_BITS = {True: 0.5 + 1 / 64 + 4 / (64 * 256), False: 0.5 + 4 / 64}
BLOCK_OF_MOMENTS = 256  # numbers that share a scale in 8-bit moments
SMALLEST_8BIT = 4096  # parameters with fewer numbers keep moments of 32 bits
# Shares of the listed rates that kernels of training reach, and seconds between two kernels:
# assumed, where nothing has been measured.
REACHED_OPERATIONS = 0.65
REACHED_BYTES = 0.75
LAUNCH = 5e-6


@dataclass(frozen=True)
class Footprint:
    """Bytes by part at the peak of each phase, the seconds of one micro-batch with its step, and
    how many numbers are trained.
    """

    phases: dict[str, dict[str, int]]
    seconds: float | None
    trained: int = 0

    @property
    def parts(self) -> dict[str, int]:
        """The bytes by part at the highest peak of a step."""
        return highest(self.phases[name] for name in ("forward", "loss", "backward", "optimizer"))


def footprint(recipe: Recipe, work: Work, card: Card | None, *, all_layers: bool) -> Footprint:
    """Return what a training's largest micro-batch and its evaluation take; not `all_layers`: from
    replays with few layers.

    Raises MocError where the method cannot be placed in the model.
    """
    shape = build.base_shape(recipe)
    layers = shape.config.get_text_config().num_hidden_layers
    depths = FEW_WITH_POOL if recipe.method.name == "moc" else FEW
    if not all_layers and layers > 2 * depths[-1]:
        with contextlib.suppress(MocError):  # of a method that cannot be placed in so few layers
            by_depth = {
                depth: _replayed(recipe, _shallow(shape, depth), work, card) for depth in depths
            }
            return _drawn_out(by_depth, layers)
    return _replayed(recipe, shape, work, card)


def _replayed(recipe: Recipe, shape: PreTrainedModel, work: Work, card: Card | None) -> Footprint:
    if recipe.train.packing:
        attend_by_row(shape)
    adapted = build.place_in_shapes(recipe, shape)
    prepare_layers(shape, recipe)
    scoring = scoring_of(recipe, shape, work.kind, work.scored_tokens)
    settings = build.make_settings(recipe)
    measured = replay(adapted, work.largest, work.kind.loss, settings, scoring=scoring)
    phases = _with_own_optimizer(measured, adapted, recipe.train.optim)
    seconds = None
    if card is not None:
        seconds = seconds_of(measured.fake.work, card, tf32=recipe.train.tf32)
    trained = sum(p.numel() for p in adapted.named_trainables().values())
    return Footprint(phases, seconds, trained)


def _shallow(shape: PreTrainedModel, layers: int) -> PreTrainedModel:
    """Return the shapes of a model with so many layers."""
    config = with_layers(shape.config, layers)
    with META:
        model: PreTrainedModel = type(shape)._from_config(
            config, dtype=shape.dtype, attn_implementation=config._attn_implementation
        )
    return model


def _drawn_out(by_depth: Mapping[int, Footprint], layers: int) -> Footprint:
    """Return what `layers` layers take: each part in each phase follows the polynomial through its
    values at the few depths, a line through two.
    """
    shares = {
        depth: math.prod((layers - node) / (depth - node) for node in by_depth if node != depth)
        for depth in by_depth
    }
    *shallower, deepest = by_depth.values()

    def grown(value: Callable[[Footprint], float]) -> float:
        return sum(share * value(by_depth[depth]) for depth, share in shares.items())

    def bytes_of(phase: str, part: str) -> int:
        return max(0, round(grown(lambda measured: measured.phases[phase].get(part, 0))))

    phases = {
        phase: {part: bytes_of(phase, part) for part in parts}
        for phase, parts in deepest.phases.items()
        if all(phase in measured.phases for measured in shallower)
    }
    is_timed = all(measured.seconds is not None for measured in by_depth.values())
    seconds = grown(lambda measured: measured.seconds or 0) if is_timed else None
    return Footprint(phases, seconds, round(grown(lambda measured: measured.trained)))


def seconds_of(work: Mapping[Kernel, int], card: Card, *, tf32: bool = False) -> float | None:
    """Return how long kernels take one after another; None where the card's rates are not known.

    Each takes as long as its operations or its bytes, whichever is more, or as its start. With
    `tf32` products of float32 are made in TF32, where the card has it.
    """
    if card.half is None or card.single is None or card.bandwidth is None:
        return None
    seconds = 0.0
    for kernel, count in work.items():
        single = card.tf32 if tf32 and card.tf32 is not None else card.single
        rate = card.half if kernel.half else single
        operations = kernel.flops / (rate * REACHED_OPERATIONS)
        moving = kernel.moved / (card.bandwidth * REACHED_BYTES)
        seconds += count * max(operations, moving, LAUNCH)
    return seconds


def quantized(
    unquantized: Footprint,
    shape: PreTrainedModel,
    quantization: Quantization,
    card: Card | None,
    *,
    recomputed: bool,
) -> Footprint:
    """Return a footprint with the linear weights of the layers in 4 or 8 bits; `shape` are the
    base's shapes without them.

    Each product makes its weight in the compute type, one at a time; that also takes time, in
    the forward and the backward pass, and once more where whole layers are `recomputed`.
    """
    names = {name for name in linear_weights(shape) if in_a_layer(name)}
    weights = [p.numel() for name, p in shape.named_parameters() if name in names]
    quantized_size, maps = _bytes_of_a_number(quantization)
    size = shape.dtype.itemsize
    saved = round(sum(weights) * (size - quantized_size))
    passing = {"forward", "backward", "evaluation"}
    phases = {
        phase: parts
        | {
            "weights": parts["weights"] - saved + len(weights) * maps,
            "activations": parts.get("activations", 0)
            + (max(weights) * size if phase in passing else 0),
        }
        for phase, parts in unquantized.phases.items()
    }
    seconds = unquantized.seconds
    if seconds is not None and card is not None and card.bandwidth is not None:
        passes = 3 if recomputed else 2
        moved = passes * sum(weights) * (quantized_size + size)
        seconds += moved / (card.bandwidth * REACHED_BYTES)
    return Footprint(phases, seconds, unquantized.trained)


def _bytes_of_a_number(quantization: Quantization) -> tuple[float, int]:
    """Return the bytes of a number with its share of scales, and those of each weight's maps from
    few bits to numbers.
    """
    if quantization.load_in_8bit:
        return 1.0, 0  # and a scale for each row
    double = quantization.bnb_4bit_use_double_quant
    return FOUR_BITS[double], 4 * (16 + 256 * double)


def _with_own_optimizer(
    measured: StepMeasurement, adapted: Adapted, kind: str
) -> dict[str, dict[str, int]]:
    """Return the bytes with moments of 8 bits where the optimizer keeps them so."""
    if not kind.endswith("8bit"):
        return measured.phases
    saved = sum(8 * p.numel() - _moments(p) for p in adapted.named_trainables().values())
    return {
        phase: parts | {"optimizer": max(0, parts.get("optimizer", 0) - saved)}
        for phase, parts in measured.phases.items()
    }


def _moments(parameter: nn.Parameter) -> int:
    """Return the bytes of a parameter's two moments in bitsandbytes' 8 bits."""
    numbers = parameter.numel()
    if numbers < SMALLEST_8BIT:
        return 8 * numbers
    return 2 * (numbers + 4 * math.ceil(numbers / BLOCK_OF_MOMENTS))
