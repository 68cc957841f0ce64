"""Medians, intervals and ratios of what was measured, as `moc bench --json` prints them.

A ratio is the median over the turns of this variant's value by that of the other one in the same
turn, so that what slows a whole turn does not count.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from moc_cli.benchmark.generation import Written
from moc_cli.benchmark.memory import Memory
from moc_cli.benchmark.steps import Measured
from moc_cli.benchmark.variants import BASE, Variant

RESAMPLES = 2000
CONFIDENCE = 0.95
Interval = list[float]


def summarize_steps(measured: Sequence[Measured]) -> dict[str, dict[str, Any]]:
    """Return an entry for each variant, by its name; ratios are of times and of bytes."""
    entries = {}
    for result in measured:
        seconds = np.array([step.seconds for step in result.steps])
        examples = np.array([step.examples for step in result.steps])
        tokens = np.array([step.tokens for step in result.steps])
        entry: dict[str, Any] = _head(result.variant) | {
            "trained": result.trained,
            "step_seconds": float(np.median(seconds)),
            "examples_per_second": float(np.median(examples / seconds)),
            "tokens_per_second": float(np.median(tokens / seconds)),
            **_bytes(result.memory),
            "interval": {"step_seconds": interval(seconds)},
        }
        for name in ("control", "lora"):
            other = _counterpart(result.variant, name, measured)
            _add_ratio(entry, name, seconds, other and [step.seconds for step in other.steps])
            for key in ("peak", "working"):
                of_other = other and getattr(other.memory, key)
                ratio = getattr(result.memory, key) / of_other if of_other else None
                entry[f"{key}_bytes_to_{name}"] = ratio
        entries[result.variant.name] = entry
    return entries


def summarize_generation(written: Sequence[Written], new: int) -> dict[str, dict[str, Any]]:
    """Return an entry for each variant and base, by its name; ratios are of tokens per second."""
    entries = {}
    for result in written:
        speed = result.rows * new / np.array(result.seconds)
        entry: dict[str, Any] = _head(result.variant) | {
            "rows": result.rows,
            "batch_seconds": float(np.median(result.seconds)),
            "tokens_per_second": float(np.median(speed)),
            **_bytes(result.memory),
            "interval": {"tokens_per_second": interval(speed)},
        }
        for name in (BASE, "control", "lora"):
            other = _counterpart(result.variant, name, written)
            speeds = other and other.rows * new / np.array(other.seconds)
            _add_ratio(entry, name, speed, speeds)
        entries[result.variant.name] = entry
    return entries


def interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Return the 95 % interval of the median: a percentile bootstrap over the turns."""
    if len(values) < 2:
        return [float(values[0])] * 2
    result = stats.bootstrap(
        (np.asarray(values),),
        np.median,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return [float(result.low), float(result.high)]


def _head(variant: Variant) -> dict[str, Any]:
    return {"method": variant.method, "changes": list(variant.changes)}


def _bytes(memory: Memory) -> dict[str, Any]:
    return {
        "peak_bytes": memory.peak,
        "kept_bytes": memory.kept,
        "working_bytes": memory.working,
    }


def _counterpart(variant: Variant, method: str, among: Sequence[Any]) -> Any:
    """Return what was measured of the first variant of a method that shares the tried values."""
    for other in among:
        if other.variant.method == method and other.variant.shared == variant.shared:
            return other
    return None


def _add_ratio(
    entry: dict[str, Any],
    name: str,
    values: np.ndarray,
    others: Sequence[float] | np.ndarray | None,
) -> None:
    """Add the ratio to another variant, and its interval; None where there is none."""
    ratios = None if others is None else values / np.asarray(others)
    entry[f"ratio_to_{name}"] = None if ratios is None else float(np.median(ratios))
    entry["interval"][f"ratio_to_{name}"] = None if ratios is None else interval(ratios)
