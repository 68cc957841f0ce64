"""Metrics of the benchmarks with their standard errors, and what a constant answer would score.

A metric is written once, as scores (R,) of labels and predictions (n,) and of counts (R, n): how
often each item counts, n in all. Each item once gives the score itself; counts of items drawn with
replacement give the resamples behind standard errors and intervals. A correlation of constant
predictions is 0: they tell nothing about the labels.

No torch here: finished runs are compared without it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from moc_cli.data.examples import ChoiceExample
from moc_cli.errors import DataError

RESAMPLES = 1000  # of the bootstrap
DRAWN_AT_ONCE = 2_000_000  # counts in one array of resamples: 16 MB
CORRELATIONS = ("matthews", "pearson", "spearman")  # 0 of any constant answer
ROUNDING = 1e-12  # a variance that is this part of the items' is one of equal values
Labels = Sequence[int | float] | np.ndarray


@dataclass(frozen=True)
class Score:
    """One metric on n items: value and standard error as fractions, and what the best constant
    answer would score (each None where there is no such thing). A perplexity is no fraction.
    """

    value: float
    stderr: float | None
    majority: float | None
    n: int


def accuracy(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The share of predictions that equal their label."""
    return np.asarray(counts @ (predictions == labels) / len(labels))


def f1(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The harmonic mean of precision and recall of class 1; 0 where nothing is found."""
    right, predicted = labels == 1, predictions == 1
    return _ratio(2 * (counts @ (right & predicted)), counts @ right + counts @ predicted)


def matthews(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Matthews' correlation; 0 where either side is constant."""
    n, classes = len(labels), np.unique(np.concatenate([labels, predictions]))
    right, predicted = (counts @ (side[:, None] == classes) for side in (labels, predictions))
    agreed = counts @ (labels == predictions)
    spread = np.sqrt((n**2 - (right**2).sum(-1)) * (n**2 - (predicted**2).sum(-1)))
    return _ratio(agreed * n - (right * predicted).sum(-1), spread)


def pearson(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's correlation; 0 where either side is constant."""
    return _correlation(labels - labels.mean(), predictions - predictions.mean(), counts)


def spearman(labels: np.ndarray, predictions: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation; 0 where either side is constant."""
    return _correlation(_ranks(labels, counts), _ranks(predictions, counts), counts)


def perplexity_of(tokens: np.ndarray, losses: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Exp of the mean loss of all tokens, of each text's tokens and its summed loss."""
    with np.errstate(over="ignore"):
        return np.asarray(np.exp((counts @ losses) / (counts @ tokens)))


def exp(loss: float) -> float:
    """Exp of a mean loss: infinite beyond 709, where Python's own raises."""
    with np.errstate(over="ignore"):
        return float(np.exp(loss))


SCORES: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "accuracy": accuracy,
    "exact_match": accuracy,
    "acc": accuracy,  # in lm-evaluation-harness
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "perplexity": perplexity_of,
}


def score(metric: str, labels: Labels, predictions: Labels) -> float:
    """Compute a metric of all items."""
    unit_counts = np.ones((1, len(labels)))
    return float(SCORES[metric](np.asarray(labels), np.asarray(predictions), unit_counts)[0])


# Those of labels and predictions; texts have another entry.
METRICS: dict[str, Callable[[Labels, Labels], float]] = {
    name: partial(score, name)
    for name in SCORES
    if name not in ("exact_match", "acc", "perplexity")
}


def draw_counts(rng: np.random.Generator, n: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each of n items is drawn in a resample, (R, n), in parts of the resamples."""
    size = max(1, DRAWN_AT_ONCE // n)
    for begin in range(0, resamples, size):
        items = rng.integers(n, size=(min(size, resamples - begin), n))
        places = items + n * np.arange(len(items))[:, None]
        counts = np.bincount(places.ravel(), minlength=items.size)
        yield counts.reshape(items.shape).astype(float)


def measure(
    metric: str, labels: Labels, predictions: Labels, constant: float | None = None
) -> Score:
    """Compute a metric with its standard error: binomial for accuracy, otherwise bootstrapped.

    A fixed seed draws the resamples. `constant` is what the best constant answer scores, by default
    that of the best label.
    """
    if len(labels) == 0 or len(labels) != len(predictions):
        raise DataError(f"{len(predictions)} predictions for {len(labels)} labels")
    value = METRICS[metric](labels, predictions)
    best = majority(metric, labels) if constant is None else constant
    if metric == "accuracy":
        return Score(value, (value * (1 - value) / len(labels)) ** 0.5, best, len(labels))
    truth, guess = np.asarray(labels), np.asarray(predictions)
    drawn = draw_counts(np.random.default_rng(0), len(truth), RESAMPLES)
    resampled = np.concatenate([SCORES[metric](truth, guess, counts) for counts in drawn])
    return Score(value, float(np.std(resampled, ddof=1)), best, len(labels))


def perplexity(rows: Sequence[tuple[float, int]]) -> Score:
    """Exp of the mean loss of all tokens; `rows` are each text's summed loss and its tokens.

    The error takes texts, not tokens, as what was drawn: that of a ratio of two means, times the
    perplexity. None for a single text.
    """
    losses = np.array([loss for loss, _ in rows], dtype=np.float64)
    tokens = np.array([count for _, count in rows], dtype=np.float64)
    mean = losses.sum() / tokens.sum()
    value = exp(mean)
    n = int((tokens > 0).sum())  # a text that was cut before its first learned token tells nothing
    if n < 2:
        return Score(value, None, None, len(rows))
    spread = float(((losses - mean * tokens) ** 2).sum()) * n / (n - 1)
    return Score(value, value * spread**0.5 / float(tokens.sum()), None, len(rows))


def majority(metric: str, labels: Labels) -> float:
    """The best score of always giving one of the labels: of F1 not always the most frequent."""
    if metric in CORRELATIONS:
        return 0.0
    values = set(np.asarray(labels).tolist())
    return max(METRICS[metric](labels, [value] * len(labels)) for value in values)


def majority_choice(examples: Sequence[ChoiceExample]) -> float:
    """The best accuracy of a constant answer: one place among the options, or one text."""
    places = Counter(example.label for example in examples)
    texts = Counter(example.candidates[example.label] for example in examples)
    return max(places.most_common(1)[0][1], texts.most_common(1)[0][1]) / len(examples)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Divide; 0 where there is nothing to divide by."""
    ratio: np.ndarray = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return ratio


def _correlation(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Pearson's correlations (R,) of centred values, (n,) or other ones in each resample (R, n)."""

    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.einsum("...n,...n->...", counts, values) / counts.shape[-1])

    of_x, of_y = mean(x), mean(y)
    spread_x, spread_y = mean(x * x) - of_x**2, mean(y * y) - of_y**2
    varied = (spread_x > ROUNDING * np.mean(x * x)) & (spread_y > ROUNDING * np.mean(y * y))
    spread = np.sqrt(np.where(varied, spread_x * spread_y, 0.0))
    return _ratio(mean(x * y) - of_x * of_y, spread)


def _ranks(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The rank of each item in each resample, (R, n), less their mean; of equal ones the middle."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    sorted_counts = counts[:, np.argsort(group, kind="stable")]
    drawn = np.add.reduceat(sorted_counts, np.cumsum(sizes) - sizes, axis=1)  # (R, groups)
    ranks = np.cumsum(drawn, axis=1) - (drawn - 1) / 2
    return np.asarray(ranks[:, group] - (len(values) + 1) / 2)
