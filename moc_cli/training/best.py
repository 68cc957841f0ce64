"""Which evaluation is the best so far, and when patience has run out."""

import math

from moc_cli.errors import MocError
from moc_cli.results import LOWER_IS_BETTER
from moc_cli.training.checkpoint import Counters


def update_best(counters: Counters, values: dict[str, float], metric: str | None) -> bool:
    """Count one evaluation and return whether it is the best so far; a NaN never is.

    Raises MocError when `values` does not hold `metric`.
    """
    counters.evaluated_step = counters.step
    if metric is None:
        return False
    if metric not in values:
        raise MocError(
            f"eval.metric_for_best_model is {metric!r}, which the evaluation does not give",
            f"allowed: {', '.join(values)}",
        )
    value, best = values[metric], counters.best_value
    better = best is None or (value < best if metric in LOWER_IS_BETTER else value > best)
    if better and not math.isnan(value):
        counters.best_value, counters.best_step = value, counters.step
        counters.bad_evaluations = 0
        return True
    counters.bad_evaluations += 1
    return False


def out_of_patience(counters: Counters, patience: int | None) -> bool:
    """Return whether `patience` evaluations in a row brought nothing better."""
    return patience is not None and counters.bad_evaluations >= patience
