"""Metrics of the benchmarks with their standard errors, and what a constant answer would score.

A correlation of constant predictions is 0: they tell nothing about the labels. sklearn and
scipy.stats take a second to import and most runs score by accuracy: they are loaded on first use.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import scipy

from moc_cli.data.examples import ChoiceExample
from moc_cli.errors import DataError

RESAMPLES = 1000  # of the bootstrap
DRAWN_AT_ONCE = 1_000_000  # rows in one array of resamples: 8 MB
Labels = Sequence[int | float] | np.ndarray


@dataclass(frozen=True)
class Measure:
    """A metric's value and standard error: binomial for accuracy, by the delta method for a
    perplexity (None for a single text), otherwise bootstrapped.
    """

    value: float
    stderr: float | None


def accuracy(labels: Labels, predictions: Labels) -> float:
    """The share of predictions that equal their label."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def f1(labels: Labels, predictions: Labels) -> float:
    """The harmonic mean of precision and recall of class 1; 0 where nothing is found."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, zero_division=0))


def matthews(labels: Labels, predictions: Labels) -> float:
    """Matthews' correlation; 0 where either side is constant."""
    from sklearn.metrics import matthews_corrcoef

    if _constant(labels) or _constant(predictions):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: Labels, predictions: Labels) -> float:
    """Pearson's correlation; 0 where either side is constant."""
    return float(correlations("pearson", np.asarray(labels), np.asarray(predictions)))


def spearman(labels: Labels, predictions: Labels) -> float:
    """Spearman's rank correlation; 0 where either side is constant."""
    return float(correlations("spearman", np.asarray(labels), np.asarray(predictions)))


def correlations(
    metric: str, labels: np.ndarray, predictions: np.ndarray, axis: int = -1
) -> np.ndarray:
    """Pearson's or Spearman's correlations along the last axis of (..., n), of shape (...); 0 where
    either side is constant.
    """
    left, right = (np.asarray(side, dtype=np.float64) for side in (labels, predictions))
    if metric == "spearman":
        left, right = scipy.stats.rankdata(left, axis=axis), scipy.stats.rankdata(right, axis=axis)
    varied = (np.ptp(left, axis=axis) > 0) & (np.ptp(right, axis=axis) > 0)
    values = np.zeros(varied.shape)
    if varied.any():
        values[varied] = scipy.stats.pearsonr(left[varied], right[varied], axis=axis).statistic
    return values


METRICS: dict[str, Callable[[Labels, Labels], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def measure(metric: str, labels: Labels, predictions: Labels) -> Measure:
    """Compute a metric with its standard error; a fixed seed draws the bootstrap's resamples."""
    if len(labels) == 0 or len(labels) != len(predictions):
        raise DataError(f"{len(predictions)} predictions for {len(labels)} labels")
    value = METRICS[metric](labels, predictions)
    if metric == "accuracy":
        return Measure(value, (value * (1 - value) / len(labels)) ** 0.5)
    if len(labels) == 1:
        return Measure(value, 0.0)  # every resample is the one item
    truth, guess, rng = np.asarray(labels), np.asarray(predictions), np.random.default_rng(0)
    if metric in OF_TABLES:
        # How often each label met each prediction: drawing such tables is drawing rows with
        # replacement, at a cost that does not grow with the rows.
        size = max(2, int(max(truth.max(), guess.max())) + 1)
        cells = np.bincount(truth * size + guess, minlength=size * size)
        drawn = rng.multinomial(len(truth), cells / len(truth), size=RESAMPLES)
        tables = drawn.reshape(-1, size, size).astype(np.float64)  # (R, label, prediction)
        return Measure(value, float(np.std(OF_TABLES[metric](tables), ddof=1)))
    resampled = scipy.stats.bootstrap(
        (truth, guess),
        partial(correlations, metric),
        n_resamples=RESAMPLES,
        batch=max(1, DRAWN_AT_ONCE // len(truth)),
        paired=True,
        vectorized=True,
        method="percentile",
        rng=rng,
    )
    return Measure(value, float(resampled.standard_error))


def perplexity(rows: Sequence[tuple[float, int]]) -> Measure:
    """Exp of the mean loss of all tokens; `rows` are each text's summed loss and its tokens.

    The error takes texts, not tokens, as what was drawn: that of a ratio of two means, times the
    perplexity.
    """
    losses = np.array([loss for loss, _ in rows], dtype=np.float64)
    tokens = np.array([count for _, count in rows], dtype=np.float64)
    mean = losses.sum() / tokens.sum()
    value = float(np.exp(mean))
    n = int((tokens > 0).sum())  # a text that was cut before its first learned token tells nothing
    if n < 2:
        return Measure(value, None)
    spread = float(((losses - mean * tokens) ** 2).sum()) * n / (n - 1)
    return Measure(value, value * spread**0.5 / float(tokens.sum()))


def f1_of(tables: np.ndarray) -> np.ndarray:
    """F1 of class 1 for counts (R, label, prediction); 0 where nothing is found."""
    hits = tables[:, 1, 1]
    either = tables[:, 1].sum(-1) + tables[:, :, 1].sum(-1)
    return _ratio(2 * hits, either)


def matthews_of(tables: np.ndarray) -> np.ndarray:
    """Matthews' correlation for counts (R, label, prediction); 0 where a side is constant."""
    n = tables.sum((1, 2))
    labels, guesses = tables.sum(2), tables.sum(1)  # (R, classes)
    agreed = np.trace(tables, axis1=1, axis2=2)
    spread = np.sqrt((n**2 - (labels**2).sum(-1)) * (n**2 - (guesses**2).sum(-1)))
    return _ratio(agreed * n - (labels * guesses).sum(-1), spread)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    ratio: np.ndarray = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return ratio


OF_TABLES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"f1": f1_of, "matthews": matthews_of}


def majority(metric: str, labels: Labels) -> float:
    """What always giving the most frequent label scores."""
    value, _ = Counter(np.asarray(labels).tolist()).most_common(1)[0]
    return METRICS[metric](labels, [value] * len(labels))


def majority_choice(examples: Sequence[ChoiceExample]) -> float:
    """The best accuracy of a constant answer: one place among the options, or one text."""
    places = Counter(example.label for example in examples)
    texts = Counter(example.candidates[example.label] for example in examples)
    return max(places.most_common(1)[0][1], texts.most_common(1)[0][1]) / len(examples)


def _constant(values: Labels) -> bool:
    return bool(np.ptp(np.asarray(values, dtype=np.float64)) == 0)
