"""One call of `moc bench`: check the machine, build the models, measure in turns, sum up."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moc_cli.benchmark.generation import measure_generation
from moc_cli.benchmark.machine import check_idle, choose_clock
from moc_cli.benchmark.models import Bases
from moc_cli.benchmark.steps import measure_steps
from moc_cli.benchmark.summary import CONFIDENCE, summarize_variants
from moc_cli.benchmark.turns import BenchmarkOptions
from moc_cli.benchmark.variants import Variant, with_bases
from moc_cli.report.progress import WorkProgress
from moc_cli.training import build
from moc_cli.training.accelerator import make_accelerator
from moc_cli.training.environment import describe_machine
from moc_cli.training.memory import ALLOCATED, COUNTED


def run_benchmark(
    recipe: str, variants: Sequence[Variant], options: BenchmarkOptions, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure and return what `moc bench --json` prints; messages go to `say`.

    Raises MocError for a GPU with other work, and naming a variant that does not fit in memory.
    """
    variants = [_with_rows(variant) for variant in variants]
    first, training = variants[0].recipe, options.lengths is None
    with tempfile.TemporaryDirectory(prefix="moc-bench-") as name:
        folder = Path(name)
        accelerator = make_accelerator(first.launch, (), folder)
        device = accelerator.device
        load = check_idle(device)
        clock, clock_name, note = choose_clock(load)
        if note is not None:
            say(note)
        bases = Bases(device, options.layers)
        arms = variants if training else with_bases(variants)
        with WorkProgress("bench", options.turns * len(arms)) as bar:
            if training:
                measured = measure_steps(arms, bases, accelerator, folder, options, clock, bar)
            else:
                measured = measure_generation(arms, bases, device, options, clock, bar)
    return {
        "methods": summarize_variants(measured, training=training),
        "measured": "training" if training else "generation",
        "recipe": recipe,
        "model": first.model.model_name_or_path,
        "layers": options.layers,
        "rows": "data" if options.own_rows else "full",
        "max_length": first.data.max_length,
        "lengths": options.lengths,
        "repeats": options.repeats,
        "warmup": options.warmup,
        "confidence": CONFIDENCE,
        "clock": clock_name,
        "memory_kind": ALLOCATED if device.type == "cuda" else COUNTED if training else None,
        "environment": describe_machine(device) | {"load": load},
    }


def _with_rows(variant: Variant) -> Variant:
    """Return a variant whose recipe knows what custom rows say: their format and labels."""
    if not variant.recipe.data.custom:
        return variant
    return replace(variant, recipe=build.read_rows(variant.recipe)[0])
