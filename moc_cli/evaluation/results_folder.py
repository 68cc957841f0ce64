"""The files of an evaluation: results.json, and a line of samples.jsonl for every item.

Both are written after every task. A folder holds one set of conditions: tasks scored later under
the same conditions are added, under others the folder begins anew.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moc_cli.errors import FileError
from moc_cli.files import write_json_atomic, write_text_atomic
from moc_cli.results import FORMAT, main_score, read_results

# Conditions that only name what others hold the hash of: a run or a base may have moved.
NAMES = ("run", "model")


class ResultsFolder:
    """The two files of one evaluation; `conditions` is what its numbers depend on.

    `replaced` names the conditions in which what the folder holds differs: it will be overwritten.
    """

    def __init__(self, folder: Path, conditions: dict[str, Any]) -> None:
        self.folder = folder
        self.conditions = conditions
        self.tasks: dict[str, Any] = {}
        self.replaced: list[str] = []
        self._lines: dict[str, str] = {}
        self._continue()

    @property
    def results_file(self) -> Path:
        return self.folder / "results.json"

    @property
    def samples_file(self) -> Path:
        return self.folder / "samples.jsonl"

    def add(self, task: str, entry: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
        """Add a scored task and write both files; the samples first, so that none is missing."""
        self.tasks[task] = entry
        self._lines[task] = "".join(
            json.dumps({"task": task} | sample, ensure_ascii=False) + "\n" for sample in samples
        )
        text = "".join(self._lines[name] for name in self.tasks)
        write_text_atomic(self.samples_file, text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        write_json_atomic(self.results_file, self.to_json() | {"samples_sha256": digest})

    def to_json(self) -> dict[str, Any]:
        """Return what results.json says, but for the hash of the samples.

        The average is the plain mean of the tasks' main values, as the papers take it.
        """
        entries = list(self.tasks.values())
        return {
            "format": FORMAT,
            **self.conditions,
            "tasks": self.tasks,
            "average": mean_of_main(entries, "value"),
            "average_of_base": mean_of_main(entries, "base"),
            "limited": any(entry["limited"] for entry in entries),
        }

    def _continue(self) -> None:
        """Take over the tasks of an earlier call under the same conditions."""
        if not self.results_file.is_file() or not self.samples_file.is_file():
            return
        try:
            saved = read_results(json.loads(self.results_file.read_text(encoding="utf-8")))
            text = self.samples_file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise FileError(f"{self.results_file} cannot be read: {error}") from error
        self.replaced = [
            key
            for key, value in self.conditions.items()
            if key not in NAMES and saved.get(key) != value
        ]
        intact = saved.get("samples_sha256") == hashlib.sha256(text.encode()).hexdigest()
        if self.replaced or not intact:
            return
        self.tasks = dict(saved["tasks"])
        self._lines = dict.fromkeys(self.tasks, "")
        for line in text.splitlines(keepends=True):
            self._lines[json.loads(line)["task"]] += line


def mean_of_main(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the plain mean of `value` or `base` of the main metrics; None where one lacks it."""
    values: list[Any] = [main_score(entry).get(key) for entry in entries]
    return None if not values or None in values else float(sum(values) / len(values))


def prompt_hash(text: str) -> str:
    """Return the first 16 digits of a prompt's sha256: names it without repeating it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
