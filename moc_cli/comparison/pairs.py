"""Items of two runs side by side, and the difference of the runs' scores on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moc_cli.comparison.bootstrap import interval, resample_scores
from moc_cli.scoring.metrics import SCORES, score

BY_ITEM = ("accuracy", "exact_match", "acc")  # means of how many items are right; acc: lm_eval's

Item = Mapping[str, Any]
Sides = tuple[np.ndarray, np.ndarray, np.ndarray]  # labels, first's and second's predictions (n,)


@dataclass(frozen=True)
class Difference:
    """A run's score minus the first run's, as fractions, on `items` that both were scored on.

    `low` and `high` are the ends of its 95 % interval; None where the items are not known. So are
    the counts of items that only one of the two has right.
    """

    run: str
    task: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    items: int = 0
    only_first: int | None = None
    only_this: int | None = None


@dataclass(frozen=True)
class PairedItems:
    """Items of two runs that are the same question with the same label.

    `unpaired` counts the items that only one run has, `relabelled` the questions whose labels
    differ; both are left out of `first` and `second`.
    """

    first: list[Item]
    second: list[Item]
    unpaired: int
    relabelled: int


def pair(first: Sequence[Item], second: Sequence[Item]) -> PairedItems:
    """Match items by row and by the hash of their prompt."""
    by_key = {(item["row"], item["prompt"]): item for item in first}
    keys = [(item["row"], item["prompt"]) for item in second]
    matched = [(by_key[key], item) for key, item in zip(keys, second, strict=True) if key in by_key]
    # A text has no label of its own.
    same_label = [
        (first_item, second_item)
        for first_item, second_item in matched
        if first_item.get("label") == second_item.get("label")
    ]
    return PairedItems(
        [first_item for first_item, _ in same_label],
        [second_item for _, second_item in same_label],
        unpaired=len(first) + len(second) - 2 * len(matched),
        relabelled=len(matched) - len(same_label),
    )


def difference(
    run: str, task: str, metric: str, pairs: PairedItems
) -> tuple[Difference, np.ndarray] | None:
    """Return the difference with its interval, and the resampled differences (R,).

    None where there are no pairs, or where items do not hold what the metric is made from.
    """
    values = sides(metric, pairs) if pairs.first else None
    if values is None:
        return None
    labels, first, second = values
    first_scores, second_scores = resample_scores(task, metric, labels, np.stack([first, second]))
    resampled = second_scores - first_scores
    value = score(metric, labels, second) - score(metric, labels, first)
    return (
        Difference(
            run, task, metric, value, *interval(resampled), len(labels), *_only_right(pairs)
        ),
        resampled,
    )


def average_difference(
    run: str, tasks: Sequence[Difference], resampled: Sequence[np.ndarray]
) -> Difference:
    """Return the mean of several tasks' differences; each task's items are resampled by itself.

    `resampled` is empty where one of the tasks has no items.
    """
    value = sum(task.value for task in tasks) / len(tasks)
    if not resampled:
        return Difference(run, "average", "", value)
    ends = interval(np.mean(resampled, axis=0))
    return Difference(run, "average", "", value, *ends, sum(task.items for task in tasks))


def sides(metric: str, pairs: PairedItems) -> Sides | None:
    """Return what the bootstrap takes for this metric; None where the items do not hold it."""
    if metric in BY_ITEM:  # an answer that could not be parsed is wrong, whatever its label
        own = all(metric in item for item in (*pairs.first, *pairs.second))  # lines of lm_eval
        right = _column(pairs, metric if own else "correct", int)
        return right and (np.ones(len(right[0]), dtype=int), *right)
    if metric == "perplexity":
        losses, tokens = _column(pairs, "loss", float), _column(pairs, "tokens", float)
        if losses is None or tokens is None:
            return None
        if (tokens[0] != tokens[1]).any() or tokens[0].min() < 1:
            return None  # other tokens were counted, so the losses are not comparable
        return tokens[0], *losses
    labels, predictions = _column(pairs, "label", float), _column(pairs, "prediction", float)
    if metric not in SCORES or labels is None or predictions is None:
        return None
    return labels[0], *predictions


def _column(pairs: PairedItems, key: str, kind: type) -> tuple[np.ndarray, np.ndarray] | None:
    """Return a value of both runs' items, (n,) each; None where an item lacks it."""
    if any(item.get(key) is None for item in (*pairs.first, *pairs.second)):
        return None
    try:
        return (
            np.array([item[key] for item in pairs.first], dtype=kind),
            np.array([item[key] for item in pairs.second], dtype=kind),
        )
    except (TypeError, ValueError, OverflowError):
        return None  # another kind of value than this metric is made from


def _only_right(pairs: PairedItems) -> tuple[int | None, int | None]:
    """Count the items that only the first run has right, and those that only the second has."""
    right = _column(pairs, "correct", bool)
    if right is None:
        return None, None
    return int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
