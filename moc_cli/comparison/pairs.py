"""Items of two runs, put side by side, and what the difference of the runs' scores on them is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moc_cli.comparison.bootstrap import (
    OF_TABLES,
    OF_VALUES,
    RESAMPLES,
    differences,
    generator,
    interval,
)
from moc_cli.scoring.metrics import METRICS

BY_ITEM = ("accuracy", "exact_match")  # means of how many items are right

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """A run's score less the first run's, as fractions, on `items` items that both were scored on.

    `low` and `high` bound it with 95 % confidence; None where the items are not known, as are the
    counts of items that only one of the two has right.
    """

    run: str
    task: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    items: int = 0
    only_first: int | None = None
    only_this: int | None = None


@dataclass(frozen=True)
class Pairs:
    """Items of two runs that are the same question with the same label.

    `unpaired` counts the items of either run that the other lacks, `relabelled` the questions whose
    labels differ; both are left out of `first` and `second`.
    """

    first: list[Item]
    second: list[Item]
    unpaired: int
    relabelled: int


def pair(first: Sequence[Item], second: Sequence[Item]) -> Pairs:
    """Match items by row and by the hash of their prompt."""
    known = {(item["row"], item["prompt"]): item for item in first}
    matched = [
        (known[item["row"], item["prompt"]], item)
        for item in second
        if (item["row"], item["prompt"]) in known
    ]
    # A text has no label of its own.
    same = [(one, other) for one, other in matched if one.get("label") == other.get("label")]
    return Pairs(
        [one for one, _ in same],
        [other for _, other in same],
        unpaired=len(first) + len(second) - 2 * len(matched),
        relabelled=len(matched) - len(same),
    )


def difference(
    run: str, task: str, metric: str, pairs: Pairs, resamples: int = RESAMPLES
) -> tuple[Difference, np.ndarray] | None:
    """Return the difference with its interval, and the resampled differences (R,).

    None where there are no pairs, or where items do not hold what the metric is made from.
    """
    if not pairs.first:
        return None
    sides = _sides(metric, pairs)
    if sides is None:
        return None
    labels, first, second = sides
    kind = "accuracy" if metric in BY_ITEM else metric
    score = METRICS.get(kind, _perplexity)
    resampled = differences(kind, labels, first, second, rng=generator(task), resamples=resamples)
    low, high = interval(resampled)
    only_first, only_this = _alone(pairs)
    found = Difference(
        run,
        task,
        metric,
        score(labels, second) - score(labels, first),
        low,
        high,
        len(labels),
        only_first,
        only_this,
    )
    return found, resampled


def average_difference(
    run: str, tasks: Sequence[Difference], resampled: Sequence[np.ndarray]
) -> Difference:
    """Return the mean of several tasks' differences; each task's items are resampled by itself.

    `resampled` is empty where one of the tasks has no items.
    """
    value = sum(one.value for one in tasks) / len(tasks)
    if not resampled:
        return Difference(run, "average", "", value)
    low, high = interval(np.mean(resampled, axis=0))
    return Difference(run, "average", "", value, low, high, sum(one.items for one in tasks))


def _sides(metric: str, pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Labels and both runs' predictions (n,), as the bootstrap wants them for this metric."""
    sides = (pairs.first, pairs.second)
    if metric in BY_ITEM:
        # An answer that could not be read is wrong, whatever its label.
        if not all("correct" in item for side in sides for item in side):
            return None
        first, second = (np.array([item["correct"] for item in side], dtype=int) for side in sides)
        return np.ones(len(first), dtype=int), first, second
    if metric == "perplexity":
        return _losses(pairs)
    if metric not in OF_TABLES and metric not in OF_VALUES:
        return None
    kind = int if metric in OF_TABLES else float
    labels = np.array([item["label"] for item in pairs.first], dtype=kind)
    first, second = (np.array([item["prediction"] for item in side], dtype=kind) for side in sides)
    return labels, first, second


def _losses(pairs: Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Tokens (n,) and both runs' summed losses; None where they count other tokens."""
    sides = (pairs.first, pairs.second)
    if not all("loss" in item for side in sides for item in side):
        return None
    tokens, others = (np.array([item["tokens"] for item in side], dtype=float) for side in sides)
    if (tokens != others).any() or tokens.min() < 1:
        return None
    first, second = (np.array([item["loss"] for item in side], dtype=float) for side in sides)
    return tokens, first, second


def _perplexity(tokens: np.ndarray, losses: np.ndarray) -> float:
    return float(np.exp(losses.sum() / tokens.sum()))


def _alone(pairs: Pairs) -> tuple[int | None, int | None]:
    """How many items only the first run has right, and how many only the second."""
    both = list(zip(pairs.first, pairs.second, strict=True))
    if not all("correct" in item for one in both for item in one):
        return None, None
    return (
        sum(one["correct"] and not other["correct"] for one, other in both),
        sum(other["correct"] and not one["correct"] for one, other in both),
    )
