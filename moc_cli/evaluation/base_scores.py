"""What is known already of the base model on the rows that are scored, to stand beside a score."""

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
class Earlier:
    """An earlier score of the base model: its task, the sha256 of its rows, metric -> value, and
    where it is from.
    """

    task: str
    rows: str
    values: Mapping[str, float]
    source: str


@dataclass(frozen=True)
class Known:
    """Earlier scores of the base model; of several on the same rows the first counts."""

    scores: Sequence[Earlier] = ()

    def find(self, task: TaskRows, evaluation: Evaluation) -> Earlier | None:
        """Return the base model's score on exactly these rows, by the same metrics; or None."""
        for score in self.scores:
            same = (score.task, score.rows) == (task.name, task.fingerprint)
            if same and set(evaluation.metrics) <= set(score.values):
                return score
        return None


def before_training(folder: RunFolder, protocol: str) -> Known:
    """Return the scores that `moc train` took before training, by the same protocol."""
    try:
        results, data = folder.read_results(), folder.read_environment()["data"]
    except (RunError, KeyError):
        return Known()
    if results.get("protocol") != protocol:
        return Known()
    hashes = {name: part.get("sha256", "") for name, part in data.items()}
    return Known(
        [
            Earlier(task, hashes.get(f"test {task}", ""), values, "before training")
            for task, values in folder.scores_before().items()
        ]
    )


def earlier_evaluation(file: Path, conditions: Mapping[str, Any]) -> Known:
    """Return the scores in the results.json of a bare model, if it has these conditions.

    Raises FileError where the file cannot be read.
    """
    if not file.is_file():
        return Known()
    try:
        results = read_results(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise FileError(f"{file} cannot be read: {error}") from error
    if any(results.get(key) != value for key, value in conditions.items()):
        return Known()
    scores = []
    for task, entry in results["tasks"].items():
        values = {name: score["value"] for name, score in entry["metrics"].items()}
        scores.append(Earlier(task, entry["rows_sha256"], values, str(file.parent)))
    return Known(scores)
