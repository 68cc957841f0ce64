"""Medians, intervals and ratios of what was measured, as `moc bench --json` prints them.

A ratio is the median over the turns of this variant's value by that of the other one in the same
turn, so that what slows a whole turn does not count.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from moc_cli.benchmark.turns import VariantMeasurement
from moc_cli.benchmark.variants import BASE, Variant

RESAMPLES = 2000
CONFIDENCE = 0.95


def summarize_variants(
    measured: Sequence[VariantMeasurement], *, training: bool
) -> dict[str, dict[str, Any]]:
    """Return an entry for each variant, by its name.

    Ratios are of the seconds of a training step and of bytes, or of the tokens per second of
    generation.
    """
    compared = ("control", "lora") if training else (BASE, "control", "lora")
    key = "step_seconds" if training else "tokens_per_second"
    entries = {}
    for result in measured:
        values, memory = _values(result, training), result.memory
        entry: dict[str, Any] = {
            "method": result.variant.method,
            "changes": list(result.variant.changes),
            **{name: float(np.median(numbers)) for name, numbers in values.items()},
            "peak_bytes": memory.peak,
            "kept_bytes": memory.kept,
            "working_bytes": memory.working,
            "interval": {key: interval(values[key])},
        }
        if training:
            entry["trained"] = result.trained
        else:
            entry["rows"] = result.turns[0].examples
        for name in compared:
            counterpart = _counterpart(result.variant, name, measured)
            ratios = (
                None if counterpart is None else values[key] / _values(counterpart, training)[key]
            )
            entry[f"ratio_to_{name}"] = None if ratios is None else float(np.median(ratios))
            entry["interval"][f"ratio_to_{name}"] = None if ratios is None else interval(ratios)
            for part in ("peak", "working") if training else ():
                of_counterpart = counterpart and getattr(counterpart.memory, part)
                ratio = getattr(memory, part) / of_counterpart if of_counterpart else None
                entry[f"{part}_bytes_to_{name}"] = ratio
        entries[result.variant.name] = entry
    return entries


def interval(values: np.ndarray) -> list[float]:
    """Return the 95 % interval of the median: a percentile bootstrap over the turns."""
    if len(values) < 2:
        return [float(values[0])] * 2
    result = stats.bootstrap(
        (values,),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(result.low), float(result.high)]


def _values(result: VariantMeasurement, training: bool) -> dict[str, np.ndarray]:
    """Return what is shown of a variant, each as the values of its turns."""
    seconds, examples, tokens = (
        np.array([getattr(turn, name) for turn in result.turns])
        for name in ("seconds", "examples", "tokens")
    )
    speed = {"tokens_per_second": tokens / seconds}
    if training:
        return {"step_seconds": seconds, "examples_per_second": examples / seconds} | speed
    return {"batch_seconds": seconds} | speed


def _counterpart(
    variant: Variant, method: str, among: Sequence[VariantMeasurement]
) -> VariantMeasurement | None:
    """Return what was measured of the first variant of a method that shares the tried values."""
    for candidate in among:
        if candidate.variant.method == method and candidate.variant.shared == variant.shared:
            return candidate
    return None
