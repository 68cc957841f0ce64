"""The bootstrap of several seeds, against one that is written out in loops."""

import math
import zlib

import numpy as np
import pytest
from scipy.stats import rankdata
from sklearn.metrics import matthews_corrcoef

from moc_cli.comparison.bootstrap import difference_of_means, resample_scores

RESAMPLES = 40


def differences(
    metric: str, labels: np.ndarray, runs: np.ndarray, seeds: int, resamples: int
) -> np.ndarray:
    scores = resample_scores("t", metric, labels, runs, resamples=resamples)
    return difference_of_means("t", scores[:seeds], scores[seeds:])


def naive(metric: str, labels: np.ndarray, runs: np.ndarray, seeds: int) -> list[float]:
    items, rng = (np.random.default_rng([purpose, zlib.crc32(b"t")]) for purpose in (0, 1))
    rows = items.integers(len(labels), size=(RESAMPLES, len(labels)))
    own = [rng.integers(n, size=(n, RESAMPLES)) for n in (len(runs) - seeds, seeds)]

    def score(run: np.ndarray, chosen: np.ndarray) -> float:
        truth, guess = labels[chosen], run[chosen]
        if metric == "accuracy":
            return sum(t == g for t, g in zip(truth, guess, strict=True)) / len(truth)
        if metric == "matthews":
            return float(matthews_corrcoef(truth, guess))
        if metric == "perplexity":  # tokens and summed losses of texts
            return math.exp(sum(guess) / sum(truth))
        if metric == "spearman":
            truth, guess = rankdata(truth), rankdata(guess)
        return float(np.corrcoef(truth, guess)[0, 1])

    values = []
    for number, chosen in enumerate(rows):
        first, second = runs[:seeds], runs[seeds:]
        means = [
            np.mean([score(side[run], chosen) for run in drawn[:, number]])
            for side, drawn in ((second, own[0]), (first, own[1]))
        ]
        values.append(means[0] - means[1])
    return values


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson", "spearman", "perplexity"])
def test_it_is_that_of_loops(metric: str) -> None:
    rng = np.random.default_rng(1)
    if metric in ("pearson", "spearman"):
        labels, runs = rng.normal(size=30), rng.normal(size=(5, 30))
    elif metric == "perplexity":
        labels = rng.integers(1, 9, size=30)
        runs = labels * rng.uniform(1, 3, size=(5, 30))
    else:
        labels, runs = rng.integers(2, size=30), rng.integers(2, size=(5, 30))
    values = differences(metric, labels, runs, 2, RESAMPLES)
    assert values == pytest.approx(naive(metric, labels, runs, seeds=2), abs=1e-12)


def test_the_correlation_of_equal_values_is_none() -> None:
    """Of two items every second resample holds one of them twice."""
    labels, runs = np.array([1000.1, 1000.4]), np.array([[0.1, 0.4], [0.3, 0.3]])
    values = differences("pearson", labels, runs, 1, 200)
    both = values[values != 0]
    assert both == pytest.approx(np.full(len(both), -1.0), abs=1e-6)
    assert 60 < len(both) < 140


def test_seeds_that_differ_widen_the_interval() -> None:
    """Items alone would say that two runs with the same mean are the same."""
    labels = np.ones(50, dtype=int)
    alike = np.repeat([[1] * 25 + [0] * 25], 4, axis=0)
    apart = np.stack([np.ones(50, int), np.zeros(50, int)] * 2)
    spread = [
        np.std(differences("accuracy", labels, runs, 2, 500))
        for runs in (alike, np.concatenate([alike[:2], apart[:2]]))
    ]
    assert spread[0] == 0
    assert spread[1] > 0.2
