"""Suites of tasks: which there are, which splits they have, and their examples."""

import gzip
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from moc_cli.data import commonsense, glue
from moc_cli.data.examples import ChoiceExample, Example
from moc_cli.data.source import Fields, build_rows, read_hub, read_local
from moc_cli.errors import DataError
from moc_cli.recipe.suggest import did_you_mean
from moc_cli.recipe.tasks import TASKS, is_packaged

# How a row of a local file and one of the hub become an example; the builtin rows are inside this
# package.
Build = Callable[[str, Fields], Example]
BUILDERS: dict[str, tuple[Build, Build]] = {
    "commonsense": (commonsense.from_fields, commonsense.from_hub),
    "glue": (glue.from_row, glue.from_row),
}


def load_examples(
    suite: str, task: str, split: str, *, path: str | Path | None = None
) -> list[Any]:
    """Every example of a split, from the folder `path` or else from the hub.

    For `validation` of a task with several (MNLI) the first, matched one is read. Raises DataError
    for an unknown name, for rows out of reach, and naming all rows that cannot be used.
    """
    check_task(suite, task)
    split = _split(suite, task, split)
    if is_packaged(suite):
        return _builtin(task, split)
    local, hub = BUILDERS[suite]
    if path is not None:
        return read_local(path, task, split, partial(local, task))
    return read_hub(TASKS[suite][task].hub[split], partial(hub, task))


def check_task(suite: str, task: str) -> None:
    """Raise DataError where the suite or its task is unknown, with the nearest name."""
    if suite not in TASKS:
        raise DataError(
            f"no suite '{suite}'{did_you_mean(suite, TASKS)}", f"suites: {', '.join(TASKS)}"
        )
    if task not in TASKS[suite]:
        raise DataError(
            f"{suite} has no task '{task}'{did_you_mean(task, TASKS[suite])}",
            f"tasks of {suite}: {', '.join(TASKS[suite])}",
        )


def scored_names(suite: str, task: str) -> dict[str, str]:
    """Return the scored splits by the name that results give them.

    MNLI has two; elsewhere the task's name alone says what was scored.
    """
    first, *other_splits = TASKS[suite][task].scored
    return {task: first} | {
        f"{task} ({part.removeprefix('validation_')})": part for part in other_splits
    }


def _split(suite: str, task: str, split: str) -> str:
    allowed, first = TASKS[suite][task].splits, TASKS[suite][task].scored[0]
    if split in allowed:
        return split
    if split == "validation" and first.startswith(split):
        return first
    reason = TASKS[suite][task].no_split.get(split)
    raise DataError(
        f"{suite}/{task} has no split '{split}'" + (f": {reason}" if reason else ""),
        f"splits: {', '.join(allowed)}",
    )


def _builtin(task: str, split: str) -> list[ChoiceExample]:
    file = files("moc_cli.builtin") / task / f"{split}.jsonl.gz"
    if not file.is_file():
        raise DataError(f"the package lacks {task}/{split}.jsonl.gz", "reinstall moc-cli")
    lines = gzip.decompress(file.read_bytes()).splitlines()
    return build_rows(lines, f"builtin/{task}/{split}", partial(commonsense.from_options, task))
