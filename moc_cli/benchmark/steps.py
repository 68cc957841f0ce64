"""Training steps of several variants in turns, through the training's own loop."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator

from moc_cli.benchmark.machine import Clock
from moc_cli.benchmark.memory import measure_peak
from moc_cli.benchmark.models import Bases, sharing_copy
from moc_cli.benchmark.rows import make_rows
from moc_cli.benchmark.turns import (
    BenchmarkOptions,
    Turn,
    VariantMeasurement,
    naming,
    take_turns,
    timed,
)
from moc_cli.benchmark.variants import Variant
from moc_cli.data.batches import padding_tokenizer
from moc_cli.data.encode import Encoded
from moc_cli.kinds import make_kind
from moc_cli.report.progress import WorkProgress
from moc_cli.training import build
from moc_cli.training.checkpoint import Checkpoints
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop import Loop

ENDLESS = 10**9  # steps: the learning rate hardly falls, and no end comes near


def measure_steps(
    variants: Sequence[Variant],
    bases: Bases,
    accelerator: Accelerator,
    folder: Path,
    options: BenchmarkOptions,
    clock: Clock,
    bar: WorkProgress,
) -> list[VariantMeasurement]:
    """Train every variant; those with equal batch sizes take the same batches.

    Raises MocError naming a variant whose step does not fit in memory.
    """
    rows = _rows_of(variants, bases, options.turns + 1, options.own_rows)  # one for the memory
    loops = [
        make_loop(variant, variant_rows, bases, accelerator, folder)
        for variant, variant_rows in zip(variants, rows, strict=True)
    ]

    def step(number: int) -> Turn:
        loop = loops[number]
        before = replace(loop.counters)
        seconds = timed(loop.train_step, loop.device, clock)
        after = loop.counters
        return Turn(seconds, after.examples - before.examples, after.tokens - before.tokens)

    turns = take_turns(variants, step, options, accelerator.device, bar)
    memories = [measure_peak(loop) for loop in loops]
    return [
        VariantMeasurement(variant, variant_turns, memory, loop.adapted.counts().trainable)
        for variant, loop, variant_turns, memory in zip(
            variants, loops, turns, memories, strict=True
        )
    ]


def _rows_of(
    variants: Sequence[Variant], bases: Bases, turns: int, own_rows: bool
) -> list[Encoded]:
    """Return each variant's rows, one list for those that agree on model and data."""
    trains = [variant.recipe.train for variant in variants]
    window = max(t.per_device_train_batch_size * t.gradient_accumulation_steps for t in trains)
    rows_by_key: dict[str, Encoded] = {}
    rows = []
    for variant in variants:
        recipe = variant.recipe
        key = recipe.model.model_dump_json() + recipe.data.model_dump_json()
        if key not in rows_by_key:
            rows_by_key[key] = make_rows(
                recipe, bases.of(recipe).model, window * turns, own_rows=own_rows
            )
        rows.append(rows_by_key[key])
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
            build.make_data(recipe, make_kind(recipe.data.task), rows, padding_tokenizer()),
            replace(build.make_settings(recipe), max_steps=ENDLESS, warmup_steps=1),
            accelerator=accelerator,
            checkpoints=Checkpoints(place / "checkpoints"),
            log=MetricsLog(place / "metrics.jsonl"),
        )
        place.mkdir()
        loop.begin(None)
    return loop
