"""Variants in turns, A B C A B C: what slows the machine for a while slows all of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from moc_cli.benchmark.machine import Clock
from moc_cli.benchmark.memory import StepMemory
from moc_cli.benchmark.variants import Variant
from moc_cli.errors import MocError
from moc_cli.report.progress import WorkProgress
from moc_cli.scoring.batch_size import is_out_of_memory
from moc_cli.training.compiled import matmul_precision

FEWER = (
    "measure fewer methods or values in a call, or lower train.per_device_train_batch_size or "
    "data.max_length"
)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each prompt, and new ones after it."""

    prompt: int
    new: int


@dataclass(frozen=True)
class BenchmarkOptions:
    """How to measure: turns that count and turns before them, how many of the model's layers (None:
    all), whether rows are the recipe's own; `lengths` of texts where generation is measured.
    """

    repeats: int = 10
    warmup: int = 2
    layers: int | None = None
    own_rows: bool = False
    lengths: Lengths | None = None

    @property
    def turns(self) -> int:
        """All turns."""
        return self.warmup + self.repeats


@dataclass(frozen=True)
class Turn:
    """What one training step, or one batch of texts, took and took in.

    `working`: bytes beyond those of the model, where they are known.
    """

    seconds: float
    examples: int
    tokens: int
    working: int = 0


@dataclass(frozen=True)
class VariantMeasurement:
    """A variant's turns, its memory, and of a training the number of trained parameters."""

    variant: Variant
    turns: list[Turn]
    memory: StepMemory
    trained: int | None = None


def take_turns(
    variants: Sequence[Variant],
    work: Callable[[int], Turn],
    options: BenchmarkOptions,
    device: torch.device,
    bar: WorkProgress,
) -> list[list[Turn]]:
    """Let every variant `work`, by its number, in each turn; return its turns that count.

    Raises MocError naming a variant that does not fit in memory.
    """
    counted: list[list[Turn]] = [[] for _ in variants]
    for number in range(options.turns):
        for place, variant in enumerate(variants):
            torch.set_float32_matmul_precision(
                matmul_precision(device, tf32=variant.recipe.train.tf32)
            )
            with naming(variant):
                turn = work(place)
            if number >= options.warmup:
                counted[place].append(turn)
            bar.observe(number * len(variants) + place + 1, facts=variant.name)
    return counted


def timed(work: Callable[[], Any], device: torch.device, clock: Clock) -> float:
    """Return the seconds of the work, until the device has done it."""
    wait(device)
    begin = clock()
    work()
    wait(device)
    return clock() - begin


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
