"""Bootstrap over items and seeds: how far a difference of mean scores could move with others."""

import numpy as np

from moc_cli.comparison.bootstrap import DRAWN_AT_ONCE, OF_VALUES, RESAMPLES, generator
from moc_cli.comparison.pairs import BY_ITEM
from moc_cli.scoring.metrics import OF_TABLES, correlations

ROUNDING = 1e-12  # a variance that is this part of the items' is one of equal values


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
        counts = _counts(rows)
        scores = np.stack([_scores(metric, labels, run, rows, counts) for run in predictions])
        first, second = scores[:seeds], scores[seeds:]
        drawn.append(_drawn_mean(second, rng) - _drawn_mean(first, rng))
    return np.concatenate(drawn)


def _drawn_mean(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the mean of as many runs, drawn with replacement, for each column of (S, R)."""
    chosen = rng.integers(len(scores), size=scores.shape)
    return np.asarray(np.take_along_axis(scores, chosen, axis=0).mean(0))


def _counts(rows: np.ndarray) -> np.ndarray:
    """Return how often each resample, of items `rows` (R, n), holds each item, (R, n)."""
    count, n = rows.shape
    places = rows + n * np.arange(count)[:, None]
    return np.bincount(places.ravel(), minlength=count * n).reshape(count, n).astype(float)


def _scores(
    metric: str,
    labels: np.ndarray,
    predictions: np.ndarray,
    rows: np.ndarray,
    counts: np.ndarray,
) -> np.ndarray:
    """Return a run's score on each of the resamples, (R,).

    `rows` are numbers of items, (R, n), and `counts` says how often each item is among them: sums
    over a resample are products with it, so that no resample is written out for each run.
    """
    if metric in (*BY_ITEM, "accuracy"):
        return np.asarray(counts @ (predictions == labels) / len(labels))
    if metric == "pearson":
        return _pearson(labels, predictions, counts)
    if metric in OF_VALUES:
        return correlations(metric, labels[rows], predictions[rows])
    if metric == "perplexity":
        return np.asarray(np.exp((counts @ predictions) / (counts @ labels)))
    size = max(2, int(max(labels.max(), predictions.max())) + 1)
    cells = (labels * size + predictions)[:, None] == np.arange(size * size)
    return np.asarray(OF_TABLES[metric]((counts @ cells).reshape(-1, size, size)))


def _pearson(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return Pearson's correlations on resamples; 0 where either side is constant."""
    x, y = labels - labels.mean(), predictions - predictions.mean()
    moments = np.stack([x, y, x * x, y * y, x * y], axis=1)
    of_x, of_y, squares_x, squares_y, products = (counts @ moments / len(x)).T
    spread_x, spread_y = squares_x - of_x**2, squares_y - of_y**2
    varied = (spread_x > ROUNDING * np.mean(x * x)) & (spread_y > ROUNDING * np.mean(y * y))
    values = np.zeros(len(counts))
    values[varied] = (products - of_x * of_y)[varied] / np.sqrt((spread_x * spread_y)[varied])
    return values
