"""Paired bootstrap: how far a difference of two scores could move with other items.

One resample draws n of the n items with replacement, the same ones for both runs, and takes the
difference of the two scores on them. What is drawn is counts: metrics of classes need only how
often each (label, first, second) came, the others how often each item came. All of a chunk's
resamples are computed at once.
"""

import zlib
from collections.abc import Callable, Iterator

import numpy as np

from moc_cli.scoring.metrics import f1_of, matthews_of

RESAMPLES = 10_000
CONFIDENCE = 0.95
CHUNK = 2_000_000  # counts held at once: 16 MB an array

BY_CLASS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"f1": f1_of, "matthews": matthews_of}
BY_VALUE = ("pearson", "spearman")


def generator(task: str) -> np.random.Generator:
    """Return a task's own generator: what it draws does not depend on the tasks beside it."""
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
    whether a prediction equals its label matters. For a perplexity they are each text's number of
    tokens, and the losses summed over them.
    """
    if metric == "accuracy":
        gained = (second == labels).astype(np.int64) - (first == labels).astype(np.int64)
        return _mean_differences(gained, rng, resamples)
    if metric in BY_CLASS:
        return _class_differences(BY_CLASS[metric], labels, first, second, rng, resamples)
    if metric in BY_VALUE:
        return _value_differences(metric, labels, first, second, rng, resamples)
    if metric == "perplexity":
        return _perplexity_differences(labels, first, second, rng, resamples)
    raise ValueError(f"no bootstrap for the metric {metric!r}")


def interval(values: np.ndarray, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the percentile interval of resampled values."""
    outside = (1 - confidence) / 2
    low, high = np.quantile(values, [outside, 1 - outside])
    return float(low), float(high)


def _mean_differences(gained: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Means of resampled values of -1, 0 and 1: only how often each came is drawn."""
    counts = np.array([np.count_nonzero(gained == value) for value in (-1, 0, 1)])
    drawn = rng.multinomial(len(gained), counts / len(gained), size=resamples)
    means: np.ndarray = (drawn[:, 2] - drawn[:, 0]) / len(gained)
    return means


def _class_differences(
    score: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    resamples: int,
) -> np.ndarray:
    """Draw tables (label, first, second); each run's own table is a margin of it."""
    size = max(2, int(max(side.max() for side in (labels, first, second))) + 1)
    cells = np.bincount((labels * size + first) * size + second, minlength=size**3)
    drawn = rng.multinomial(len(labels), cells / len(labels), size=resamples)
    tables = drawn.reshape(-1, size, size, size).astype(np.float64)
    found: np.ndarray = score(tables.sum(2)) - score(tables.sum(3))
    return found


def _value_differences(
    metric: str,
    labels: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    resamples: int,
) -> np.ndarray:
    columns = [_Column(values, ranks=metric == "spearman") for values in (labels, first, second)]
    found = []
    for counts in _counts(len(labels), rng, resamples):
        truth, one, other = (column.deviations(counts) for column in columns)
        found.append(_correlation(counts, truth, other) - _correlation(counts, truth, one))
    return np.concatenate(found)


def _perplexity_differences(
    tokens: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    rng: np.random.Generator,
    resamples: int,
) -> np.ndarray:
    found = []
    for counts in _counts(len(tokens), rng, resamples):
        seen = counts @ tokens
        found.append(np.exp(counts @ second / seen) - np.exp(counts @ first / seen))
    return np.concatenate(found)


def _counts(n: int, rng: np.random.Generator, resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each item was drawn, (chunk, n), until there are enough resamples."""
    chunk = max(1, CHUNK // n)
    for begin in range(0, resamples, chunk):
        rows = min(chunk, resamples - begin)
        drawn = rng.integers(0, n, size=(rows, n)) + n * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)


class _Column:
    """Values of items, or their mid-ranks within each resample."""

    def __init__(self, values: np.ndarray, *, ranks: bool) -> None:
        self.ranks = ranks
        self.values = values.astype(np.float64)
        self.order = np.argsort(self.values, kind="stable")
        known, self.group = np.unique(self.values, return_inverse=True)
        self.starts = np.searchsorted(self.values[self.order], known)

    def deviations(self, counts: np.ndarray) -> np.ndarray:
        """Return (chunk, n): each item's value, or rank, less the resample's mean."""
        n = counts.shape[1]
        if self.ranks:
            tied = np.add.reduceat(counts[:, self.order], self.starts, axis=1)
            # Items of one value share the middle of the ranks that they take up.
            values = (np.cumsum(tied, axis=1) - (tied - 1) / 2)[:, self.group]
        else:
            values = np.broadcast_to(self.values, counts.shape)
        mean = (counts * values).sum(1, keepdims=True) / n
        deviations: np.ndarray = values - mean
        # A resample of one value has no spread; rounding must not give it one.
        present = counts > 0
        top = np.where(present, values, -np.inf).max(1)
        bottom = np.where(present, values, np.inf).min(1)
        deviations[top == bottom] = 0
        return deviations


def _correlation(counts: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return (chunk,) weighted correlations of deviations; 0 where a side is constant."""
    together = (counts * left * right).sum(1)
    spread = np.sqrt((counts * left**2).sum(1) * (counts * right**2).sum(1))
    found: np.ndarray = np.divide(together, spread, out=np.zeros_like(together), where=spread > 0)
    return found
