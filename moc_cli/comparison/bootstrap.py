"""Bootstrap over items and seeds: how far a difference of mean scores could move with others.

One resample draws n of the n items with replacement, the same ones for all runs, and each side's
runs with replacement, each side by itself: two methods share no luck of a seed.
"""

import zlib

import numpy as np

from moc_cli.scoring.metrics import SCORES, draw_counts

RESAMPLES = 10_000
CONFIDENCE = 0.95


def resample_scores(
    task: str,
    metric: str,
    labels: np.ndarray,
    predictions: np.ndarray,
    *,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Return the scores (S, R) of runs on resampled items, as fractions.

    `labels` are (n,), `predictions` (S, n). For a perplexity they are the number of tokens of each
    text, and the runs' losses summed over them. A task has its own resamples, the same ones
    whatever the runs are.
    """
    drawn = draw_counts(_generator(0, task), len(labels), resamples)
    parts = [[SCORES[metric](labels, run, counts) for run in predictions] for counts in drawn]
    return np.asarray(np.concatenate(parts, axis=1))


def difference_of_means(task: str, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return resampled differences of mean scores, second minus first, (R,).

    `first` and `second` are the resampled scores (S, R) of each side's seeds.
    """
    rng = _generator(1, task)
    difference: np.ndarray = _drawn_mean(second, rng) - _drawn_mean(first, rng)
    return difference


def interval(values: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval of resampled values."""
    outside = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def _generator(purpose: int, task: str) -> np.random.Generator:
    return np.random.default_rng([purpose, zlib.crc32(task.encode())])


def _drawn_mean(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the mean of as many runs, drawn with replacement, for each column of (S, R)."""
    chosen = rng.integers(len(scores), size=scores.shape)
    return np.asarray(np.take_along_axis(scores, chosen, axis=0).mean(0))
