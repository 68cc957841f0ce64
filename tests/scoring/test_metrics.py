"""Metrics against their definitions, worked out by hand, degenerate cases included."""

import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef
from support.messages import refused

from moc_cli.data.commonsense import make_example
from moc_cli.data.examples import ChoiceExample
from moc_cli.data.splits import read_splits
from moc_cli.errors import DataError
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.tasks import TASKS
from moc_cli.scoring.metrics import (
    METRICS,
    SCORES,
    Score,
    draw_counts,
    majority,
    majority_choice,
    measure,
    perplexity,
)

# 3 found of class 1, 1 found wrongly, 2 missed, 4 rightly left: out of 10.
LABELS = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
GUESSES = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A metric that is not defined must say 0 in silence."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_counts_of_classes() -> None:
    assert METRICS["accuracy"](LABELS, GUESSES) == pytest.approx(7 / 10)
    precision, recall = 3 / 4, 3 / 5
    expected = 2 * precision * recall / (precision + recall)
    assert METRICS["f1"](LABELS, GUESSES) == pytest.approx(expected)
    expected = (3 * 4 - 1 * 2) / math.sqrt((3 + 1) * (3 + 2) * (4 + 1) * (4 + 2))
    assert METRICS["matthews"](LABELS, GUESSES) == pytest.approx(expected)


def test_correlations() -> None:
    labels, guesses = [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 4.0, 9.0]
    # Deviations from the means 1.5 and 3.5; the ranks agree wholly.
    expected = 15.0 / math.sqrt(5.0 * 49.0)
    assert METRICS["pearson"](labels, guesses) == pytest.approx(expected)
    assert METRICS["spearman"](labels, guesses) == pytest.approx(1.0)
    assert METRICS["spearman"](labels, [0.0, 1.0, 9.0, 4.0]) == pytest.approx(0.8)
    assert METRICS["spearman"](labels, [1.0, 1.0, 1.0, 2.0]) == pytest.approx(math.sqrt(0.6))


@pytest.mark.parametrize("metric", METRICS)
def test_perfect_and_opposite(metric: str) -> None:
    labels = [0, 1, 1, 0, 1, 0]
    opposite = [1 - label for label in labels]
    assert METRICS[metric](labels, labels) == pytest.approx(1)
    worst = -1 if metric in ("matthews", "pearson", "spearman") else 0
    assert METRICS[metric](labels, opposite) == pytest.approx(worst)


@pytest.mark.parametrize("metric", ["matthews", "pearson", "spearman"])
@pytest.mark.parametrize("constant", [0, 1])
def test_constant_answers_correlate_with_nothing(metric: str, constant: int) -> None:
    assert measure(metric, LABELS, [constant] * 10).value == 0
    assert measure(metric, [constant] * 10, GUESSES).value == 0
    assert measure(metric, [constant] * 10, [constant] * 10).value == 0
    assert measure(metric, LABELS, [constant] * 10).stderr == 0
    assert majority(metric, LABELS) == 0


def test_f1_of_constant_answers() -> None:
    assert measure("f1", LABELS, [0] * 10).value == 0
    assert measure("f1", [0] * 10, [0] * 10).value == 0
    assert measure("f1", LABELS, [1] * 10).value == pytest.approx(2 * 0.5 / 1.5)


@pytest.mark.parametrize("metric", METRICS)
def test_one_item_gives_no_warning(metric: str) -> None:
    assert measure(metric, [1], [1]).stderr == 0


def test_error_of_accuracy_is_binomial() -> None:
    assert measure("accuracy", LABELS, GUESSES).stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 10))
    assert measure("accuracy", LABELS, LABELS).stderr == 0


def test_bootstrapped_error_is_that_of_the_formula() -> None:
    """Of Pearson's r of n normal pairs the standard error is about (1 - r**2) / sqrt(n)."""
    rng = np.random.default_rng(1)
    labels = rng.normal(size=400)
    guesses = labels + rng.normal(size=400)
    first = measure("pearson", labels, guesses)
    assert first.stderr == pytest.approx((1 - first.value**2) / math.sqrt(400), rel=0.15)
    assert measure("pearson", labels, guesses) == first


@pytest.mark.parametrize("metric", ["f1", "matthews", "pearson", "spearman"])
def test_bootstrap_resamples_rows(metric: str) -> None:
    """Against the plain way: draw rows, compute the metric, many times."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 2, size=60)
    guesses = np.where(rng.random(60) < 0.75, labels, 1 - labels)
    draws = rng.integers(0, 60, size=(300, 60))
    plain = np.std([METRICS[metric](labels[draw], guesses[draw]) for draw in draws], ddof=1)
    # 300 draws know a spread to about 1 / sqrt(600) = 4 %, 1000 to 2 %.
    assert measure(metric, labels, guesses).stderr == pytest.approx(plain, rel=0.15)


LIBRARY = {
    "accuracy": lambda labels, guesses: np.mean(labels == guesses),
    "f1": lambda labels, guesses: f1_score(labels, guesses, labels=[1], average="micro"),
    "matthews": matthews_corrcoef,
    "pearson": lambda labels, guesses: pearsonr(labels, guesses).statistic,
    "spearman": lambda labels, guesses: spearmanr(labels, guesses).statistic,
}


@pytest.mark.parametrize("metric", METRICS)
def test_a_resample_has_the_score_that_libraries_give_its_items(metric: str) -> None:
    """Three classes, so that many values are tied."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, size=30)
    guesses = np.where(rng.random(30) < 0.6, labels, rng.integers(0, 3, size=30))
    (counts,) = draw_counts(rng, 30, 40)
    assert (counts.sum(1) == 30).all()
    resamples = [np.repeat(np.arange(30), row.astype(int)) for row in counts]
    expected = [LIBRARY[metric](labels[items], guesses[items]) for items in resamples]
    assert SCORES[metric](labels, guesses, counts) == pytest.approx(expected, abs=1e-12)


def test_bootstrap_leaves_the_global_generator_alone() -> None:
    before = np.random.get_state()[1].tolist()
    measure("f1", LABELS, GUESSES)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(("labels", "guesses"), [([], []), ([1, 0], [1])])
def test_missing_predictions_are_refused(labels: list[int], guesses: list[int]) -> None:
    with refused(DataError):
        measure("accuracy", labels, guesses)


def test_majority_is_that_of_the_best_label() -> None:
    labels = [1, 1, 0, 2]
    assert majority("accuracy", labels) == 0.5
    # Always saying 1 finds every 1, half of them wrongly.
    assert majority("f1", [1, 1, 1, 0, 0]) == pytest.approx(2 * 0.6 / 1.6)
    rare = [0] * 63 + [1] * 37
    assert majority("f1", rare) == measure("f1", rare, [1] * 100).value > 0.5
    assert majority("f1", [0, 0]) == 0


def test_majority_of_choices_is_the_better_of_place_and_text() -> None:
    def ask(words: list[str], right: int) -> ChoiceExample:
        return make_example("world", "Where?", words, right)

    by_text = [ask(["a", "b"], 0), ask(["b", "a"], 1), ask(["c", "a"], 1), ask(["c", "d"], 0)]
    assert majority_choice(by_text) == 0.75
    by_place = [ask(["a", "b"], 0), ask(["b", "a"], 0), ask(["c", "a"], 0), ask(["d", "c"], 1)]
    assert majority_choice(by_place) == 0.75


def test_f1_is_of_class_1_alone() -> None:
    """Of 10, class 1 is found thrice, wrongly once, missed twice; class 0 is another question."""
    assert METRICS["f1"](LABELS, GUESSES) == pytest.approx(6 / 9)  # 2 * 3 / (2 * 3 + 1 + 2)
    swapped = [1 - label for label in LABELS], [1 - guess for guess in GUESSES]
    assert METRICS["f1"](*swapped) == pytest.approx(8 / 11)  # 2 * 4 / (2 * 4 + 2 + 1)


def test_matthews_is_the_correlation_of_two_binary_columns() -> None:
    """Worked out with fractions: (3*4 - 1*2) / sqrt(4 * 5 * 5 * 6), and that is Pearson's r."""
    assert METRICS["matthews"](LABELS, GUESSES) == pytest.approx(10 / math.sqrt(600))
    assert METRICS["pearson"](LABELS, GUESSES) == pytest.approx(10 / math.sqrt(600))


def test_spearman_gives_ties_their_middle_rank() -> None:
    """Labels 1 1 4 4 rank 1.5 1.5 3.5 3.5, guesses 5 6 6 6 rank 1 3 3 3.

    Deviations from 2.5: -1 -1 1 1 and -1.5 .5 .5 .5. Their products sum to 1.5 - .5 + .5 + .5 = 2,
    their squares to 4 and 3.
    """
    found = METRICS["spearman"]([1.0, 1.0, 4.0, 4.0], [5.0, 6.0, 6.0, 6.0])
    assert found == pytest.approx(2 / math.sqrt(12))
    # Ranks without ties: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15).
    assert METRICS["spearman"]([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)


def test_pearson_sees_distances_and_neither_shift_nor_scale() -> None:
    labels, guesses = [0.0, 2.5, 5.0], [1.0, 0.0, 2.0]
    # Deviations -2.5 0 2.5 and 0 -1 1: 2.5 / sqrt(12.5 * 2).
    assert METRICS["pearson"](labels, guesses) == pytest.approx(0.5)
    assert METRICS["pearson"](labels, [100 + 7 * guess for guess in guesses]) == pytest.approx(0.5)


def test_constant_predictions_say_what_they_are_worth() -> None:
    """The five degenerate answers of GLUE: always 0, always 1, one score, labels all alike."""
    assert METRICS["accuracy"](LABELS, [0] * 10) == 0.5
    assert METRICS["accuracy"](LABELS, [1] * 10) == 0.5
    assert METRICS["f1"](LABELS, [0] * 10) == 0
    assert METRICS["f1"](LABELS, [1] * 10) == pytest.approx(10 / 15)  # 2 * 5 / (2 * 5 + 5 + 0)
    assert METRICS["f1"]([0] * 10, LABELS) == 0
    assert METRICS["matthews"](LABELS, [0] * 10) == METRICS["matthews"](LABELS, [1] * 10) == 0
    for metric in ("pearson", "spearman"):
        assert METRICS[metric]([0.0, 2.5, 5.0], [3.3] * 3) == 0
        assert METRICS[metric]([2.5] * 3, [0.0, 2.5, 5.0]) == 0


def test_three_classes_of_mnli() -> None:
    labels, guesses = [0, 1, 2, 2], [0, 2, 2, 1]
    assert METRICS["accuracy"](labels, guesses) == 0.5
    assert majority("accuracy", labels) == 0.5


def test_mnli_s_two_parts_are_scored_apart(tmp_path: Path) -> None:
    folder = tmp_path / "mnli"
    folder.mkdir()
    row = {"premise": "a", "hypothesis": "b", "label": 2}
    for split, count in (("train", 1), ("validation_matched", 2), ("validation_mismatched", 3)):
        (folder / f"{split}.jsonl").write_text((json.dumps(row) + "\n") * count)
    _, rows = read_splits(DataSection(suite="glue", tasks=["mnli"], path=str(tmp_path)))
    found = {name: len(examples) for name, examples in rows.tests.items()}
    assert found == {"mnli": 2, "mnli (mismatched)": 3}


def test_every_glue_task_names_known_metrics() -> None:
    main = {task: kind.metrics[0] for task, kind in TASKS["glue"].items()}
    assert {metric for kind in TASKS["glue"].values() for metric in kind.metrics} <= set(METRICS)
    assert main["cola"] == "matthews"
    assert main["stsb"] == "pearson"
    assert {main[task] for task in main if task not in ("cola", "stsb")} == {"accuracy"}
    # Beside the main ones, those that the GLUE paper reports.
    beside = {task: kind.metrics[1:] for task, kind in TASKS["glue"].items() if kind.metrics[1:]}
    assert beside == {"mrpc": ("f1",), "qqp": ("f1",), "stsb": ("spearman",)}
    assert len(TASKS["glue"]["mnli"].scored) == 2


# Perplexity


def test_perplexity_is_that_of_all_tokens_with_the_error_of_drawn_texts() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 30, size=200)
    losses = tokens * (1.5 + 0.4 * rng.standard_normal(200))
    rows = list(zip(losses.tolist(), tokens.tolist(), strict=True))
    found = perplexity(rows)
    assert found.value == pytest.approx(math.exp(losses.sum() / tokens.sum()))
    drawn = [
        math.exp(losses[draw].sum() / tokens[draw].sum())
        for draw in (rng.integers(0, 200, size=200) for _ in range(2000))
    ]
    assert found.stderr == pytest.approx(np.std(drawn, ddof=1), rel=0.1)
    cut = perplexity([*rows, (0.0, 0)])  # a text cut before its answer
    assert (cut.value, cut.stderr) == (found.value, found.stderr)


def test_the_perplexity_of_one_text_has_no_error() -> None:
    assert perplexity([(4.0, 2)]) == Score(math.exp(2), None, None, 1)
    assert perplexity([(4.0, 2), (6.0, 3)]).stderr == pytest.approx(0)
