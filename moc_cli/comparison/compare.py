"""`moc compare`: scores, differences and notes of several runs."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moc_cli.comparison import conditions
from moc_cli.comparison.bootstrap import CONFIDENCE, RESAMPLES
from moc_cli.comparison.pairs import Difference, PairedItems, average_difference, difference, pair
from moc_cli.comparison.runs import FINAL, Items, Run, read_items
from moc_cli.errors import RunError
from moc_cli.recipe.suggest import choices
from moc_cli.results import is_fraction, main_score


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    `label` names the scores that are compared, `tasks` those shown; `commands` give the items that
    are missing.
    """

    runs: list[Run]
    label: str
    tasks: list[str]
    differences: list[Difference]
    notes: list[str]
    commands: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain values."""
        scored = [run.scores[self.label].tasks for run in self.runs if self.label in run.scores]
        averaged = _averaged(self.tasks, scored)
        return {
            "scores": self.label,
            "runs": [_describe(run, self.label, self.tasks, averaged) for run in self.runs],
            "averaged": averaged,
            "first": self.runs[0].name,
            "differences": [asdict(difference) for difference in self.differences],
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "notes": self.notes,
            "missing_items": self.commands,
        }


def compare_runs(
    runs: Sequence[Run],
    *,
    program: str = "moc",
    tasks: Sequence[str] = (),
    label: str | None = None,
) -> Comparison:
    """Compare runs with the first one.

    `label` chooses the scores (a folder below RUN/eval, or final); without it, those that all
    runs have with the most items. Raises RunError for a label or a task that no run has, and where
    a run has no task in common with the first.
    """
    label = _choose_scores(runs, label)
    tasks = _choose_tasks(runs, label, tasks)
    notes = conditions.notes(runs, label, tasks)
    differences: list[Difference] = []
    first = runs[0]
    other_runs = [run for run in runs[1:] if label in run.scores and label in first.scores]
    items = {run.name: _items(run, label, notes) for run in [first, *other_runs] if other_runs}
    for run in other_runs:
        differences += _differences(first, run, label, tasks, items, notes)
    if not other_runs:
        notes.append("No two runs have scores: there are no differences to show.")
    commands = _commands(runs, program) if label == FINAL else []
    return Comparison(list(runs), label, tasks, differences, notes, commands)


def _averaged(tasks: Sequence[str], scored: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the tasks of which an average is taken: those that all have, if all are fractions.

    Subtasks of lm-evaluation-harness stand beside their group, which counts them already.
    """
    common = [
        task
        for task in tasks
        if scored and all(task in entries and "part_of" not in entries[task] for entries in scored)
    ]
    metrics = {entries[task]["metric"] for entries in scored for task in common}
    return common if len(common) == 1 or all(map(is_fraction, metrics)) else []


def method_name(run: Run) -> str:
    """Return the method with the numbers that distinguish its variants, as `moc r64 K1 α0.95`."""
    method = run.recipe.method.model_dump()
    parts = [method["name"], f"r{method['rank']}"]
    if method["name"] == "moc":
        parts.append(f"K{method['top_k']}")
        parts.append(f"α{method['alpha']:g}")
    if method.get("sites", "attn+ffn") != "attn+ffn":
        parts.append(method["sites"])
    return " ".join(parts)


def _describe(
    run: Run, label: str, tasks: Sequence[str], averaged: Sequence[str]
) -> dict[str, Any]:
    """Return what the tables show of one run; None for what it does not have."""
    results = run.results or {}
    entries = run.scores[label].tasks if label in run.scores else {}
    values = [main_score(entries[task])["value"] for task in averaged if task in entries]
    seconds, memory = results.get("seconds"), results.get("memory", {})
    parameters = results.get("parameters", {})
    return {
        "name": run.name,
        "path": run.path,
        "method": method_name(run),
        "status": "finished" if run.results else "not finished",
        "step": results.get("steps", run.step),
        "tasks": {
            task: {
                metric: {key: score.get(key) for key in ("value", "stderr", "n", "majority")}
                for metric, score in entries[task]["metrics"].items()
            }
            for task in tasks
            if task in entries
        },
        "average": sum(values) / len(values) if values else None,
        "trained": parameters.get("adapter"),
        "share": parameters.get("share"),
        "seconds": seconds,
        "tokens_per_second": results["tokens"] / seconds if seconds else None,
        "peak_memory": memory.get("peak"),
        "memory_kind": memory.get("kind"),
        "routing": {
            pool: {
                "local_share": state["local_share"],
                "dead": len(state["dead"]),
                "controls": len(state["controls"]),
            }
            for pool, state in results.get("routing", {}).get("pools", {}).items()
        },
    }


def _choose_scores(runs: Sequence[Run], label: str | None) -> str:
    """Return the label of the scores to compare."""
    labels = list(dict.fromkeys(label for run in runs for label in run.scores))
    if label is not None:
        if label not in labels:
            raise RunError(f"no run has scores called '{label}'{choices(label, labels)}")
        return label
    scored = [run for run in runs if run.scores]
    common = [
        name for name in labels if name != FINAL and all(name in run.scores for run in scored)
    ]
    return max(
        common,
        key=lambda name: (
            min(run.scores[name].items for run in scored),
            name.startswith("rank"),
        ),
        default=FINAL,
    )


def _choose_tasks(runs: Sequence[Run], label: str, names: Sequence[str]) -> list[str]:
    """Return the tasks to show; `mnli` stands for both of its parts."""
    scored = {run.name: run.scores[label].tasks for run in runs if label in run.scores}
    tasks = list(dict.fromkeys(task for entries in scored.values() for task in entries))
    chosen = [task for task in tasks if not names or any(_matches(task, name) for name in names)]
    for name in names:
        if not any(_matches(task, name) for task in tasks):
            raise RunError(f"no run was scored on '{name}'{choices(name, tasks)}")
    first = scored.get(runs[0].name)
    if first is not None:
        apart = [n for n, entries in scored.items() if not {*entries} & {*first} & {*chosen}]
        if apart:
            listed = "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in scored.items())
            raise RunError(
                f"{', '.join(apart)} has no task in common with {runs[0].name} ({listed})",
                "compare runs that were scored on the same tasks",
            )
    return chosen


def _matches(task: str, name: str) -> bool:
    return task == name or task.startswith(f"{name} (")


def _items(run: Run, label: str, notes: list[str]) -> Items:
    """Return a run's scored items; where they cannot be trusted, none and a note."""
    try:
        return read_items(run.scores[label])
    except RunError as error:
        notes.append(f"{error.message}: no items of {run.name} are used.")
        return {}


def _differences(
    first: Run,
    run: Run,
    label: str,
    tasks: Sequence[str],
    items: dict[str, Items],
    notes: list[str],
) -> list[Difference]:
    """Return every task's difference of `run` to `first`, then that of the average."""
    run_tasks, first_tasks = run.scores[label].tasks, first.scores[label].tasks
    averaged = _averaged(tasks, [run_tasks, first_tasks])
    differences: list[Difference] = []
    main: list[Difference] = []
    resampled: list[np.ndarray] = []
    for task in tasks:
        if task not in run_tasks or task not in first_tasks:
            if task in run_tasks or task in first_tasks:
                lacking = first if task in run_tasks else run
                notes.append(
                    f"{lacking.name} has no score of {task}: it is left out of the differences."
                )
            continue
        pairs = pair(items[first.name].get(task, []), items[run.name].get(task, []))
        notes += _pairing_notes(task, first, run, pairs)
        for metric, score in run_tasks[task]["metrics"].items():
            first_value = first_tasks[task]["metrics"].get(metric, {}).get("value")
            if first_value is None or score["value"] is None:
                continue
            paired = difference(run.name, task, metric, pairs)
            differences.append(
                Difference(run.name, task, metric, score["value"] - first_value)
                if paired is None
                else paired[0]
            )
            if metric == run_tasks[task]["metric"] and task in averaged:
                main.append(differences[-1])
                resampled += [] if paired is None else [paired[1]]
    if len(main) > 1:
        complete = len(resampled) == len(main)
        differences.append(average_difference(run.name, main, resampled if complete else []))
    return differences


def _pairing_notes(task: str, first: Run, run: Run, pairs: PairedItems) -> list[str]:
    notes = []
    if pairs.unpaired:
        notes.append(
            f"{task}: {pairs.unpaired:,} items are in only one of {first.name} and {run.name}; "
            "the difference is on those that both have."
        )
    if pairs.relabelled:
        notes.append(
            f"{task}: {pairs.relabelled:,} items have another label in {first.name} than in "
            f"{run.name} and are left out: the rows are not the same."
        )
    return notes


def _commands(runs: Sequence[Run], program: str) -> list[str]:
    """Return the commands after which all runs have items under the same conditions."""
    evaluations = [scores for run in runs for label, scores in run.scores.items() if label != FINAL]
    best = max(evaluations, key=lambda scores: scores.items, default=None)
    commands = []
    for run in runs:
        if run.results is None or (best is not None and best.label in run.scores):
            continue
        parts = [program, "eval", run.path]
        if best is not None and best.conditions.get("limit") is not None:
            parts += ["--limit", str(best.conditions["limit"])]
        if best is not None and best.conditions.get("protocol") == "generate":
            parts += ["--protocol", "generate"]
        commands.append(shlex.join(parts))
    return commands
