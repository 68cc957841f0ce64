"""Paired bootstrap: how far the difference of two scores could move with other items.

One resample draws n of the n items with replacement, the same items for both runs, and takes the
difference of the two scores on them. Metrics of classes depend only on how often each (label,
first, second) occurs, so counts are drawn instead of items; the others go through scipy.
"""

import zlib
from functools import partial

import numpy as np
import scipy

from moc_cli.scoring.metrics import OF_TABLES, correlations

RESAMPLES = 10_000
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 2_000_000  # items of one array: 16 MB

OF_VALUES = ("pearson", "spearman")


def generator(task: str) -> np.random.Generator:
    """Return a task's own generator: its resamples do not depend on the other tasks."""
    return np.random.default_rng([0, zlib.crc32(task.encode())])


def differences(
    metric: str,
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    *,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Return second's score minus first's on each of the resamples (R,), as fractions.

    `labels`, `first` and `second` are (n,): labels and both runs' predictions. For accuracy only
    whether a prediction equals its label matters. For a perplexity they are the number of tokens
    of each text, and both runs' losses summed over them.
    """
    n = len(labels)
    if metric == "accuracy":
        gain = (second == labels).astype(int) - (first == labels).astype(int)  # -1, 0 or 1
        drawn = rng.multinomial(n, np.bincount(gain + 1, minlength=3) / n, size=resamples)
        return np.asarray((drawn[:, 2] - drawn[:, 0]) / n)
    if metric in OF_TABLES:
        size = max(2, int(max(labels.max(), first.max(), second.max())) + 1)
        cells = np.bincount((labels * size + first) * size + second, minlength=size**3)
        drawn = rng.multinomial(n, cells / n, size=resamples)
        tables = drawn.reshape(-1, size, size, size).astype(float)  # (R, label, first, second)
        score = OF_TABLES[metric]
        return np.asarray(score(tables.sum(2)) - score(tables.sum(3)))
    if metric not in (*OF_VALUES, "perplexity"):
        raise ValueError(f"no bootstrap for the metric {metric!r}")
    statistic = partial(difference, metric)
    if n == 1:  # every resample is the one item; scipy asks for two
        return np.repeat(statistic(labels[None], first[None], second[None]), resamples)
    result = scipy.stats.bootstrap(
        (labels, first, second),
        statistic,
        n_resamples=resamples,
        batch=max(1, DRAWN_AT_ONCE // n),
        vectorized=True,
        paired=True,
        method="percentile",
        rng=rng,
    )
    return np.asarray(result.bootstrap_distribution)


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of resampled values."""
    outside = (1 - confidence) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def difference(
    metric: str, labels: np.ndarray, first: np.ndarray, second: np.ndarray, axis: int = -1
) -> np.ndarray:
    """Second's score minus first's, along the last axis of (..., n)."""
    if metric == "perplexity":
        tokens = labels.sum(axis)
        return np.asarray(np.exp(second.sum(axis) / tokens) - np.exp(first.sum(axis) / tokens))
    before, after = (correlations(metric, labels, side, axis) for side in (first, second))
    return np.asarray(after - before)
