"""Runs to compare: recipe, results, evaluations and items, as far as their folders hold them."""

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moc_cli.adapter.folder import read_config
from moc_cli.errors import RunError
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe
from moc_cli.results import main_score
from moc_cli.run_files import Sample, parse, read_bytes
from moc_cli.runs import RunFolder

PACKED = "samples.jsonl.gz"  # what a sweep keeps of samples.jsonl
FINAL = "final"  # training's own scores; the others are called as their folders in RUN/eval
Items = dict[str, list[dict[str, Any]]]  # lines of samples.jsonl by task


@dataclass(frozen=True)
class Scores:
    """One evaluation of a run: what it was made under, and each task's entry of results.json.

    `folder` holds samples.jsonl; None for training's own scores, which keep no items.
    """

    label: str
    conditions: dict[str, Any]
    tasks: dict[str, Any]
    folder: Path | None = None

    @property
    def items(self) -> int:
        """How many items were scored, over all tasks."""
        return sum(main_score(entry)["n"] for entry in self.tasks.values())


@dataclass(frozen=True)
class Run:
    """One run to compare; `results` is None until it has finished."""

    name: str
    folder: RunFolder
    recipe: Recipe
    results: dict[str, Any] | None
    environment: dict[str, Any]
    controls: dict[str, Any]
    lines: list[dict[str, Any]]
    scores: dict[str, Scores] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """The folder, as the user wrote it."""
        return str(self.folder.path)

    @property
    def step(self) -> int:
        """The last logged step."""
        return max((line["step"] for line in self.lines), default=0)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every run.

    Raises RunError when there are fewer than two, when one is named twice, and naming each folder
    that is no run.
    """
    if len(paths) < 2:
        raise RunError(
            f"one run alone cannot be compared: {paths[0] if paths else 'none given'}",
            "give two run folders or more: moc compare RUN RUN",
        )
    paths_read: dict[Path, Path] = {}
    for path in paths:
        if path.resolve() in paths_read:
            raise RunError(
                f"{path} and {paths_read[path.resolve()]} are the same run", "give each run once"
            )
        paths_read[path.resolve()] = path
    folders, wrong = [], []
    for path in paths:
        try:
            folders.append(_open(path))
        except RunError as error:
            wrong.append(error)
    if wrong:
        raise RunError("\n".join(error.message for error in wrong), wrong[0].hint)
    return [_read(name, folder) for name, folder in zip(_short_names(paths), folders, strict=True)]


def read_items(scores: Scores) -> Items:
    """Return the lines of samples.jsonl by task; raises RunError where they cannot be trusted."""
    if scores.folder is None:
        return {}
    path = scores.folder / "samples.jsonl"
    packed = scores.folder / PACKED
    content = _unpacked(packed) if packed.is_file() else read_bytes(path)
    if scores.conditions.get("samples_sha256") != hashlib.sha256(content).hexdigest():
        raise RunError(f"{path} does not match the hash in results.json")
    items: Items = {}
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        item = parse(line, Sample, f"{path}:{number}")
        items.setdefault(item["task"], []).append(item)
    return items


def _unpacked(path: Path) -> bytes:
    try:
        return gzip.decompress(read_bytes(path))
    except (OSError, EOFError, zlib.error) as error:
        raise RunError(f"{path} is damaged: {error}") from error


def _open(path: Path) -> RunFolder:
    seeds = path / "seeds.json"
    if seeds.is_file():
        raise RunError(
            f"{path} holds one run for each of several seeds",
            f"give one of them, as {path}/seed-<n>; {seeds} names the median run",
        )
    if (path / "sweep.json").is_file():
        raise RunError(
            f"{path} holds the runs of a sweep", "moc sweep shows them side by side; or give two"
        )
    return RunFolder.open(path)


def _read(name: str, folder: RunFolder) -> Run:
    results = folder.read_results() if (folder.path / "results.json").is_file() else None
    if results is not None and results.get("status") != "finished":
        results = None
    environment = folder.path / "environment.json"
    controls = read_config(folder.controls) if folder.controls.is_dir() else {}
    scores = evaluations(folder)
    if results is not None:
        conditions = {key: results.get(key) for key in ("protocol", "train_on_inputs")}
        scores[FINAL] = Scores(FINAL, conditions, results["tasks"])
    return Run(
        name=name,
        folder=folder,
        recipe=load_recipe(folder.recipe_file),
        results=results,
        environment=folder.read_environment() if environment.is_file() else {},
        controls=controls,
        lines=folder.read_metrics(),
        scores=scores,
    )


def evaluations(folder: RunFolder) -> dict[str, Scores]:
    """Read what `moc eval` has written into the run, by the names of its folders."""
    return {
        label: Scores(label, results, results.pop("tasks"), folder.path / "eval" / label)
        for label, results in folder.read_evaluations().items()
    }


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as many as make all names different."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
