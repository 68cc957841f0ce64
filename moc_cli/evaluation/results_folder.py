"""The files of an evaluation: results.json, and a line of samples.jsonl for every item.

Both are written after every task. A folder holds one set of conditions: tasks scored later under
the same conditions are added, under others the folder starts over. Several calls may write into one
folder at the same time.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moc_cli.errors import FileError, RunError
from moc_cli.files import (
    check_folder,
    clear_leftovers,
    locked,
    write_json_atomic,
    write_text_atomic,
)
from moc_cli.results import FORMAT, main_score
from moc_cli.run_files import Sample, parse, read_bytes, read_evaluation

RESULTS = "results.json"
SAMPLES = "samples.jsonl"
OTHER = "give another folder: --output-dir DIR"


def check_results_folder(folder: Path, *, within: Path | None = None) -> None:
    """Raise MocError unless scores can be written there and replace nothing but other scores.

    `within` is the run folder that `folder` lies in by its name.
    """
    check_folder(folder, within=within)
    if os.path.lexists(folder / "recipe.yaml"):
        raise FileError(f"{folder} is a run folder, whose own results would be replaced", OTHER)
    results, samples = (os.path.lexists(folder / name) for name in (RESULTS, SAMPLES))
    try:
        is_evaluation = not results or "samples_sha256" in read_evaluation(folder / RESULTS)
        if is_evaluation and samples and not results:  # it was stopped between the two
            is_evaluation = bool(_read_samples(folder / SAMPLES))
    except RunError as error:
        raise RunError(error.message, OTHER) from error
    if not is_evaluation:
        name = folder / (RESULTS if results else SAMPLES)
        raise FileError(f"{name} was not written by `moc eval` and would be overwritten", OTHER)


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
        self._lines: dict[str, str] = {}
        self._scored: set[str] = set()  # by this call
        if folder.is_dir():
            clear_leftovers(folder)
        self.replaced = self._continue()

    @property
    def results_file(self) -> Path:
        return self.folder / RESULTS

    @property
    def samples_file(self) -> Path:
        return self.folder / SAMPLES

    def add(self, task: str, entry: dict[str, Any], samples: Sequence[dict[str, Any]]) -> None:
        """Add a scored task and write both files; the samples first, so that none is missing.

        Raises FileError where another call has started the folder over in the meantime.
        """
        with locked(self.folder):
            differing = self._continue()
            if differing and (self._scored or differing != self.replaced):
                raise FileError(
                    f"{self.folder} holds other {', '.join(differing)} than when this call began: "
                    "another process writes there",
                    OTHER,
                )
            self.tasks[task] = entry
            self._scored.add(task)
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

    def _continue(self) -> list[str]:
        """Take over the tasks that other calls have scored under the same conditions.

        Returns in what the folder differs otherwise, and takes nothing then.
        """
        if not all(map(os.path.lexists, (self.results_file, self.samples_file))):
            return []
        saved = read_evaluation(self.results_file)
        differing = [
            key
            for key, value in self.conditions.items()
            if key not in NAMES and saved.get(key) != value
        ]
        digest = hashlib.sha256(read_bytes(self.samples_file)).hexdigest()
        if not differing and saved.get("samples_sha256") != digest:
            differing = [SAMPLES]  # one of the two files was changed or cut off
        if differing:
            return differing
        other_tasks = {
            name: entry for name, entry in saved["tasks"].items() if name not in self._scored
        }
        lines = dict.fromkeys(other_tasks, "")
        for task, line in _read_samples(self.samples_file):
            if task in lines:
                lines[task] += line
        self.tasks |= other_tasks
        self._lines |= lines
        return []


def _read_samples(path: Path) -> list[tuple[str, str]]:
    """Return the lines with their tasks; RunError where one is not of `moc eval`."""
    lines = read_bytes(path).split(b"\n")[:-1]
    return [
        (parse(line, Sample, f"{path}:{number}")["task"], line.decode("utf-8") + "\n")
        for number, line in enumerate(lines, 1)
    ]


def mean_of_main(entries: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """Return the plain mean of `value` or `base` of the main metrics; None where one lacks it."""
    values: list[Any] = [main_score(entry).get(key) for entry in entries]
    return None if not values or None in values else float(sum(values) / len(values))


def prompt_hash(text: str) -> str:
    """Return the first 16 digits of a prompt's sha256: names it without repeating it."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
