"""Bootstrap over items and seeds: how far a difference of mean scores could move with others.

One resample draws n of the n items with replacement, the same ones for all runs, and each side's
runs with replacement, each side by itself: two methods share no luck of a seed.
"""

import zlib

import numpy as np

from moc_cli.scoring.metrics import SCORES, draw_counts

RESAMPLES = 10_000
CONFIDENCE = 0.95


def differences(
    task: str,
    metric: str,
    labels: np.ndarray,
    predictions: np.ndarray,
    *,
    seeds: int = 1,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Return resampled differences of mean scores, second minus first, (R,), as fractions.

    `labels` are (n,), `predictions` (S, n): those of the first `seeds` runs, then those of the
    second side. For a perplexity they are the number of tokens of each text, and the runs' losses
    summed over them. A task has its own resamples, whatever the other tasks are.
    """
    rng = np.random.default_rng([0, zlib.crc32(task.encode())])
    drawn = []
    for counts in draw_counts(rng, len(labels), resamples):
        scores = np.stack([SCORES[metric](labels, run, counts) for run in predictions])
        drawn.append(_drawn_mean(scores[seeds:], rng) - _drawn_mean(scores[:seeds], rng))
    return np.concatenate(drawn)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval of resampled values."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def _drawn_mean(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the mean of as many runs, drawn with replacement, for each column of (S, R)."""
    chosen = rng.integers(len(scores), size=scores.shape)
    return np.asarray(np.take_along_axis(scores, chosen, axis=0).mean(0))
