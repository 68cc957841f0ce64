"""Scores of the base model that earlier commands have left on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc_cli.data.splits import TaskRows
from moc_cli.errors import FileError, RunError
from moc_cli.results import read_results
from moc_cli.runs import RunFolder
from moc_cli.scoring.results import Evaluation


@dataclass(frozen=True)
class BaseScore:
    """The base model's score: its task, the sha256 of its rows, metric -> value, and where it is
    from.
    """

    task: str
    rows: str
    values: Mapping[str, float]
    source: str


def find_score(
    scores: Sequence[BaseScore], task: TaskRows, evaluation: Evaluation
) -> BaseScore | None:
    """Return the first score on exactly these rows by the same metrics, or None."""
    for score in scores:
        same_rows = (score.task, score.rows) == (task.name, task.fingerprint)
        if same_rows and set(evaluation.metrics) <= set(score.values):
            return score
    return None


def before_training(folder: RunFolder, protocol: str) -> list[BaseScore]:
    """Return the scores that `moc train` took before training, by the same protocol."""
    try:
        results, data = folder.read_results(), folder.read_environment()["data"]
    except (RunError, KeyError):
        return []
    if results.get("protocol") != protocol:
        return []
    hashes = {name: part.get("sha256", "") for name, part in data.items()}
    return [
        BaseScore(task, hashes.get(f"test {task}", ""), values, "before training")
        for task, values in folder.scores_before().items()
    ]


def earlier_evaluation(file: Path, conditions: Mapping[str, Any]) -> list[BaseScore]:
    """Return the scores in the results.json of a bare model, if it has these conditions.

    Raises FileError where the file cannot be read.
    """
    if not file.is_file():
        return []
    try:
        results = read_results(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise FileError(f"{file} cannot be read: {error}") from error
    if any(results.get(key) != value for key, value in conditions.items()):
        return []
    return [
        BaseScore(
            task,
            entry["rows_sha256"],
            {name: score["value"] for name, score in entry["metrics"].items()},
            str(file.parent),
        )
        for task, entry in results["tasks"].items()
    ]
