"""Rows of the GLUE tasks, and of others of their shape, to examples."""

from moc_cli.data.examples import PairExample
from moc_cli.data.source import BadRow, Fields, take
from moc_cli.recipe.tasks import TASKS, Task

HIGHEST_SCORE = 5.0  # of a pair in STS-B


def from_row(task: str, row: Fields) -> PairExample:
    """The example of a row in the hub's columns; raises BadRow."""
    facts = TASKS["glue"][task]
    texts = [take(row, column, str) for column in facts.columns]
    second = texts[1] if len(texts) == 2 else None
    return PairExample(task, texts[0], second, _label(facts, row))


def _label(task: Task, row: Fields) -> int | float:
    if task.num_labels == 1:
        score = row.get("label")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise BadRow(f"'label' is {score!r}, not a number")
        if not 0 <= score <= HIGHEST_SCORE:
            raise BadRow(f"'label' is {score}, not a score from 0 to 5")
        return float(score)
    label = take(row, "label", int)
    if label == -1:
        raise BadRow("'label' is -1: this split's labels are hidden")
    if not 0 <= label < task.num_labels:
        raise BadRow(f"'label' is {label}, not one of 0 to {task.num_labels - 1}")
    return label
