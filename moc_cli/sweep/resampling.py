"""Bootstrap over items and seeds: how far a difference of mean scores could move with others."""

import numpy as np

from moc_cli.comparison.bootstrap import DRAWN_AT_ONCE, OF_VALUES, RESAMPLES, generator
from moc_cli.comparison.pairs import BY_ITEM
from moc_cli.scoring.metrics import OF_TABLES, correlations


def resampled_scores(
    task: str,
    metric: str,
    labels: np.ndarray,
    predictions: np.ndarray,
    *,
    seeds: int,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """Return resampled differences of mean scores, second minus first, (R,).

    `labels` are (n,), `predictions` (S, n): those of the first `seeds` runs, then those of the
    second side. A resample draws n items with replacement, the same ones for all runs, and each
    side's runs with replacement, each side by itself: two methods share no luck of a seed.
    """
    rng = generator(task)
    n, size = len(labels), max(1, DRAWN_AT_ONCE // len(labels))
    drawn = []
    for begin in range(0, resamples, size):
        count = min(size, resamples - begin)
        rows = rng.integers(n, size=(count, n))
        scores = np.stack([_scores(metric, labels, run, rows) for run in predictions])  # (S, count)
        first, second = scores[:seeds], scores[seeds:]
        drawn.append(_drawn_mean(second, rng) - _drawn_mean(first, rng))
    return np.concatenate(drawn)


def _drawn_mean(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the mean of as many runs, drawn with replacement, for each column of (S, R)."""
    chosen = rng.integers(len(scores), size=scores.shape)
    return np.asarray(np.take_along_axis(scores, chosen, axis=0).mean(0))


def _scores(
    metric: str, labels: np.ndarray, predictions: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Return a run's score on each of the resamples: `rows` are numbers of items, (R, n)."""
    if metric in (*BY_ITEM, "accuracy"):
        return np.asarray((predictions == labels)[rows].mean(1))
    if metric in OF_VALUES:
        return correlations(metric, labels[rows], predictions[rows])
    if metric == "perplexity":
        return np.asarray(np.exp(predictions[rows].sum(1) / labels[rows].sum(1)))
    size = max(2, int(max(labels.max(), predictions.max())) + 1)
    cells = (labels * size + predictions)[rows]
    tables = np.stack([(cells == cell).sum(1) for cell in range(size * size)], axis=1)
    return np.asarray(OF_TABLES[metric](tables.reshape(-1, size, size).astype(float)))
