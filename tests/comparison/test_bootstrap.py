"""The paired bootstrap against a plain loop, against formulas, and against the truth it covers."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moc_cli.comparison import bootstrap
from moc_cli.comparison.bootstrap import interval
from moc_cli.scoring import metrics
from moc_cli.scoring.metrics import METRICS

Runs = tuple[np.ndarray, np.ndarray, np.ndarray]


def differences(
    metric: str, labels: np.ndarray, first: np.ndarray, second: np.ndarray, **given: Any
) -> np.ndarray:
    """The resampled differences of two runs."""
    task, runs = given.pop("task", "a"), np.stack([first, second])
    first, second = bootstrap.resample_scores(task, metric, labels, runs, **given)
    return second - first


def classes(n: int, seed: int, rights: tuple[float, float] = (0.7, 0.8)) -> Runs:
    """Labels of two classes, and predictions that are right so often."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < 0.4).astype(int)
    first, second = (np.where(rng.random(n) < right, labels, 1 - labels) for right in rights)
    return labels, first, second


def values(n: int, seed: int) -> Runs:
    """Scores in steps, so that many are tied, and predictions near them."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, size=n).astype(float)
    return labels, labels + rng.normal(0, 2, n), np.round(labels + rng.normal(0, 1, n))


def plain(metric: str, runs: Runs, resamples: int, seed: int) -> np.ndarray:
    """The definition: draw items, score both runs on them, subtract."""
    labels, first, second = runs
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(resamples):
        draw = rng.integers(0, len(labels), size=len(labels))
        one, other = (METRICS[metric](labels[draw], run[draw]) for run in (first, second))
        found.append(other - one)
    return np.array(found)


MAKERS: dict[str, Callable[[int, int], Runs]] = {
    "accuracy": classes,
    "f1": classes,
    "matthews": classes,
    "pearson": values,
    "spearman": values,
}


@pytest.mark.parametrize("metric", MAKERS)
def test_it_is_the_plain_loop(metric: str) -> None:
    """Mean, spread and both ends agree within what some hundred plain resamples can tell."""
    runs = MAKERS[metric](80, 1)
    fast = differences(metric, *runs)
    slow = plain(metric, runs, 600, seed=2)
    spread = slow.std()
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.18 * spread)
    assert fast.std() == pytest.approx(spread, rel=0.15)
    assert interval(fast) == pytest.approx(interval(slow), abs=0.35 * spread)
    # It is centred where the score of all items is.
    whole = METRICS[metric](runs[0], runs[2]) - METRICS[metric](runs[0], runs[1])
    assert fast.mean() == pytest.approx(whole, abs=0.2 * spread)


@pytest.mark.parametrize("metric", MAKERS)
def test_a_single_item_has_one_difference(metric: str) -> None:
    labels, first, second = (side[:1] for side in MAKERS[metric](5, 3))
    found = differences(metric, labels, first, second, resamples=7)
    expected = METRICS[metric](labels, second) - METRICS[metric](labels, first)
    assert found.tolist() == [expected] * 7


@pytest.mark.parametrize("metric", MAKERS)
def test_the_same_predictions_differ_by_nothing(metric: str) -> None:
    labels, first, _ = MAKERS[metric](50, 4)
    found = differences(metric, labels, first, first.copy(), resamples=500)
    assert interval(found) == (0.0, 0.0)


@pytest.mark.parametrize("metric", MAKERS)
def test_it_has_a_direction(metric: str) -> None:
    labels, first, _ = MAKERS[metric](200, 5)
    there = differences(metric, labels, first, labels, resamples=500)
    back = differences(metric, labels, labels, first, resamples=500)
    assert there.min() > 0 > back.max()


def test_accuracy_has_the_interval_of_the_formula() -> None:
    """With b and c items that one run alone has right, the difference's variance is
    ((b + c) - (c - b)^2 / n) / n^2.
    """
    n, only_first, only_second = 1000, 60, 110
    labels = np.ones(n, dtype=int)
    first, second = labels.copy(), labels.copy()
    second[:only_first] = 0
    first[only_first : only_first + only_second] = 0
    found = differences("accuracy", labels, first, second)
    gained = only_second - only_first
    error = math.sqrt(only_first + only_second - gained**2 / n) / n
    expected = (gained / n - 1.959964 * error, gained / n + 1.959964 * error)
    assert interval(found) == pytest.approx(expected, abs=0.04 * error + 0.5 / n)
    assert found.std() == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("metric", ["accuracy", "matthews", "pearson"])
def test_the_interval_covers_the_truth_as_often_as_it_says(metric: str) -> None:
    """200 samples from a world whose true difference is known: 95 % of the intervals hold it."""
    rights = (0.7, 0.8)

    def draw(n: int, seed: int) -> Runs:
        if metric != "pearson":
            return classes(n, seed, rights)
        rng = np.random.default_rng(seed)
        labels = rng.normal(size=n)
        return labels, labels + rng.normal(size=n), labels + 0.7 * rng.normal(size=n)

    world = draw(400_000, 6)
    truth = METRICS[metric](world[0], world[2]) - METRICS[metric](world[0], world[1])
    covered = 0
    for seed in range(200):
        found = differences(metric, *draw(150, 100 + seed), resamples=1000)
        low, high = interval(found)
        covered += low <= truth <= high
    # Of 200, 190 are expected, with a standard deviation of 3; a bootstrap is a little short.
    assert 178 <= covered <= 199


def test_draws_are_repeatable_and_a_task_s_own() -> None:
    runs = classes(100, 7)
    once, again = (differences("f1", *runs, resamples=50) for _ in range(2))
    other = differences("f1", *runs, task="b", resamples=50)
    assert once.tolist() == again.tolist() != other.tolist()


def test_many_items_are_drawn_in_parts(monkeypatch) -> None:
    sizes = []
    usual = metrics.SCORES["pearson"]

    def watched(labels, predictions, counts):
        sizes.append(counts.size)
        return usual(labels, predictions, counts)

    monkeypatch.setitem(metrics.SCORES, "pearson", watched)
    found = differences("pearson", *values(50_000, 8), resamples=90)
    assert len(found) == 90
    assert len(sizes) >= 2 * 3
    assert max(sizes) <= metrics.DRAWN_AT_ONCE


def test_perplexities_are_drawn_by_text() -> None:
    """Against the plain loop, and nothing where both runs lose the same."""
    rng = np.random.default_rng(10)
    tokens = rng.integers(1, 30, size=60).astype(float)
    first = tokens * rng.uniform(1, 3, size=60)
    second = first - tokens * rng.uniform(0, 0.4, size=60)
    fast = differences("perplexity", tokens, first, second)
    slow = []
    for draw in rng.integers(0, 60, size=(600, 60)):
        one, other = (math.exp(run[draw].sum() / tokens[draw].sum()) for run in (first, second))
        slow.append(other - one)
    assert interval(fast) == pytest.approx(interval(np.array(slow)), abs=0.35 * np.std(slow))
    assert fast.std() == pytest.approx(np.std(slow), rel=0.12)
    same = differences("perplexity", tokens, first, first.copy())
    assert interval(same) == (0.0, 0.0)
