"""Metrics of the benchmarks with their standard errors, and what a constant answer would score.

A correlation of constant predictions is 0: they tell nothing about the labels.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

from moc_cli.data.examples import ChoiceExample
from moc_cli.errors import DataError

RESAMPLES = 1000  # of the bootstrap
Labels = Sequence[int | float] | np.ndarray


@dataclass(frozen=True)
class Measure:
    """A metric's value and standard error: binomial for accuracy, otherwise bootstrapped."""

    value: float
    stderr: float


def accuracy(labels: Labels, predictions: Labels) -> float:
    """The share of predictions that equal their label."""
    return float(np.mean(np.asarray(labels) == np.asarray(predictions)))


def f1(labels: Labels, predictions: Labels) -> float:
    """The harmonic mean of precision and recall of class 1; 0 where nothing is found."""
    return float(f1_score(labels, predictions, pos_label=1, zero_division=0))


def matthews(labels: Labels, predictions: Labels) -> float:
    """Matthews' correlation; 0 where either side is constant."""
    if _constant(labels) or _constant(predictions):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: Labels, predictions: Labels) -> float:
    """Pearson's correlation; 0 where either side is constant."""
    if _constant(labels) or _constant(predictions):
        return 0.0
    return float(stats.pearsonr(labels, predictions).statistic)


def spearman(labels: Labels, predictions: Labels) -> float:
    """Spearman's rank correlation; 0 where either side is constant."""
    if _constant(labels) or _constant(predictions):
        return 0.0
    return float(stats.spearmanr(labels, predictions).statistic)


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
    truth, guess = np.asarray(labels), np.asarray(predictions)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(truth), size=(RESAMPLES, len(truth)))
    values = [METRICS[metric](truth[draw], guess[draw]) for draw in draws]
    return Measure(value, float(np.std(values, ddof=1)))


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
