"""Scores of the base model that earlier commands have left on disk."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moc_cli.data.splits import TaskRows
from moc_cli.run_files import read_evaluation
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


# What adapter_config.json says of a base: another one, or one kept otherwise, has other scores.
OF_BASE = ("base_weights_sha256", "base_quantization")


def before_training(
    folder: RunFolder, protocol: str, trained: Mapping[str, Any], loaded: Mapping[str, Any]
) -> list[BaseScore]:
    """Return the scores that `moc train` took before training, by the same protocol.

    None where the base that is `loaded` is not the one of the training. Raises RunError where the
    run's files are damaged.
    """
    if any(trained.get(key) != loaded.get(key) for key in OF_BASE):
        return []
    if not all(
        os.path.lexists(folder.path / name) for name in ("results.json", "environment.json")
    ):
        return []  # it has not finished
    results, data = folder.read_results(), folder.read_environment().get("data", {})
    if results.get("protocol") != protocol:
        return []
    hashes = {name: part["sha256"] for name, part in data.items()}
    return [
        BaseScore(task, hashes.get(f"test {task}", ""), values, "before training")
        for task, values in folder.read_scores_before().items()
    ]


def earlier_evaluation(file: Path, conditions: Mapping[str, Any]) -> list[BaseScore]:
    """Return the scores in the results.json of a bare model, if it has these conditions.

    Raises RunError where the file is damaged.
    """
    if not os.path.lexists(file):
        return []
    results = read_evaluation(file)
    if any(results.get(key) != value for key, value in conditions.items()):
        return []
    return [
        BaseScore(
            task,
            entry.get("rows_sha256", ""),
            {name: score["value"] for name, score in entry["metrics"].items()},
            str(file.parent),
        )
        for task, entry in results["tasks"].items()
    ]
