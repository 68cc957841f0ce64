"""Training steps of several variants, one after another and again, through the training's loop."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from moc_cli.benchmark.machine import Clock
from moc_cli.benchmark.memory import Memory, measure_peak
from moc_cli.benchmark.models import Bases, sharing_copy
from moc_cli.benchmark.rows import make_rows, padding_tokenizer
from moc_cli.benchmark.variants import Variant
from moc_cli.data.encode import Encoded
from moc_cli.errors import MocError
from moc_cli.kinds import make_kind
from moc_cli.scoring.batch_size import is_out_of_memory
from moc_cli.training import build
from moc_cli.training.checkpoint import Checkpoints
from moc_cli.training.compiled import matmul_precision
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop import Loop

ENDLESS = 10**9  # steps: the learning rate hardly falls, and no end comes near
FEWER = (
    "measure fewer methods or values in a call, or lower train.per_device_train_batch_size or "
    "data.max_length"
)

Progress = Callable[[int, str], None]  # turns done, the variant of the last one


@dataclass(frozen=True)
class Step:
    """What one step took and took in."""

    seconds: float
    examples: int
    tokens: int


@dataclass(frozen=True)
class Measured:
    """A variant's steps, its peak memory, and the number of its trained parameters."""

    variant: Variant
    steps: list[Step]
    memory: Memory
    trained: int


def measure_steps(
    variants: Sequence[Variant],
    bases: Bases,
    accelerator: Accelerator,
    folder: Path,
    *,
    repeats: int,
    warmup: int,
    own_rows: bool,
    clock: Clock,
    on_progress: Progress,
) -> list[Measured]:
    """Train every variant for `warmup` steps, then for `repeats`, in turns: A B C A B C.

    Variants with equal batch sizes take the same batches. Raises MocError naming a variant whose
    step does not fit in memory.
    """
    turns = warmup + repeats + 1  # one more for the memory
    rows = _rows_of(variants, bases, turns, own_rows)
    loops = [
        make_loop(variant, taken, bases, accelerator, folder)
        for variant, taken in zip(variants, rows, strict=True)
    ]
    steps: list[list[Step]] = [[] for _ in variants]
    for turn in range(warmup + repeats):
        for number, (variant, loop) in enumerate(zip(variants, loops, strict=True)):
            step = _timed(loop, variant, clock)
            if turn >= warmup:
                steps[number].append(step)
            on_progress(turn * len(variants) + number + 1, variant.name)
    memories = [measure_peak(loop) for loop in loops]
    return [
        Measured(variant, taken, memory, loop.adapted.counts().trainable)
        for variant, loop, taken, memory in zip(variants, loops, steps, memories, strict=True)
    ]


def _rows_of(variants: Sequence[Variant], bases: Bases, turns: int, own: bool) -> list[Encoded]:
    """Return each variant's rows, one list for those that agree on model and data."""
    trains = [variant.recipe.train for variant in variants]
    window = max(t.per_device_train_batch_size * t.gradient_accumulation_steps for t in trains)
    made: dict[str, Encoded] = {}
    rows = []
    for variant in variants:
        recipe = variant.recipe
        key = recipe.model.model_dump_json() + recipe.data.model_dump_json()
        if key not in made:
            made[key] = make_rows(recipe, bases.of(recipe).model, window * turns, own=own)
        rows.append(made[key])
    return rows


def make_loop(
    variant: Variant, rows: Encoded, bases: Bases, accelerator: Accelerator, folder: Path
) -> Loop:
    """Return a training that is ready for its first step; nothing of it is kept in `folder`."""
    recipe = variant.recipe
    with naming(variant):
        base = sharing_copy(bases.of(recipe))
        built = build.place_method(recipe, base, accelerator.device)
        place = folder / f"{len(list(folder.iterdir()))}"
        loop = Loop(
            built.adapted,
            build.make_data(recipe, make_kind(recipe.data), rows, padding_tokenizer()),
            replace(build.make_settings(recipe), max_steps=ENDLESS, warmup_steps=1),
            accelerator=accelerator,
            checkpoints=Checkpoints(place / "checkpoints"),
            log=MetricsLog(place / "metrics.jsonl"),
        )
        place.mkdir()
        loop.begin(None)
    return loop


def _timed(loop: Loop, variant: Variant, clock: Clock) -> Step:
    before = replace(loop.counters)
    torch.set_float32_matmul_precision(matmul_precision(variant.recipe, loop.device))
    with naming(variant):
        wait(loop.device)
        begin = clock()
        loop.train_step()
        wait(loop.device)
        seconds = clock() - begin
    counters = loop.counters
    return Step(seconds, counters.examples - before.examples, counters.tokens - before.tokens)


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def naming(variant: Variant) -> Iterator[None]:
    """Say which variant cannot be measured, and why."""
    try:
        yield
    except MocError as error:
        raise MocError(f"{variant.name}: {error.message}", FEWER) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise MocError(f"{variant.name} does not fit in memory", FEWER) from error
