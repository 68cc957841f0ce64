"""`moc compare` behind the door: scores, differences and remarks of several runs."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moc_cli.comparison import conditions
from moc_cli.comparison.bootstrap import CONFIDENCE, RESAMPLES
from moc_cli.comparison.pairs import Difference, average_difference, difference, pair
from moc_cli.comparison.runs import FINAL, Run, read_items
from moc_cli.errors import RunError
from moc_cli.recipe.suggest import choices
from moc_cli.results import main_score


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
    remarks: list[str]
    commands: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain values."""
        common = common_tasks(self.runs, self.label, self.tasks)
        return {
            "scores": self.label,
            "runs": [describe(run, self.label, self.tasks, common) for run in self.runs],
            "averaged": common,
            "first": self.runs[0].name,
            "differences": [asdict(one) for one in self.differences],
            "confidence": CONFIDENCE,
            "resamples": RESAMPLES,
            "remarks": self.remarks,
            "missing_items": self.commands,
        }


def compare(
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
    chosen = _label(runs, label)
    shown = _tasks(runs, chosen, tasks)
    differences: list[Difference] = []
    remarks = conditions.remarks(runs, chosen, shown)
    commands = _missing(runs, program) if chosen == FINAL else []
    first = runs[0]
    others = [run for run in runs[1:] if chosen in run.scores and chosen in first.scores]
    items = {run.name: _items(run, chosen, remarks) for run in [first, *others] if others}
    for run in others:
        found, said = _against(first, run, chosen, shown, items)
        differences += found
        remarks += said
    if not others:
        remarks.append("No two runs have scores: there are no differences to show.")
    return Comparison(list(runs), chosen, shown, differences, remarks, commands)


def common_tasks(runs: Sequence[Run], label: str, tasks: Sequence[str]) -> list[str]:
    """Return the tasks that every run with these scores has."""
    scored = [run.scores[label].tasks for run in runs if label in run.scores]
    return [task for task in tasks if scored and all(task in entries for entries in scored)]


def describe(run: Run, label: str, tasks: Sequence[str], averaged: Sequence[str]) -> dict[str, Any]:
    """Return what is known of one run; what is not is None."""
    results = run.results or {}
    entries = run.scores[label].tasks if label in run.scores else {}
    means = [main_score(entries[task])["value"] for task in averaged if task in entries]
    seconds, memory = results.get("seconds"), results.get("memory", {})
    return {
        "name": run.name,
        "path": run.path,
        "method": method_words(run),
        "status": "finished" if run.results else "not finished",
        "step": results.get("steps", run.step),
        "tasks": {task: _metrics(entries[task]) for task in tasks if task in entries},
        "average": sum(means) / len(means) if means else None,
        "trained": results.get("parameters", {}).get("adapter"),
        "share": results.get("parameters", {}).get("share"),
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


def method_words(run: Run) -> str:
    """Return the method with the numbers that tell its variants apart."""
    found = run.recipe.method.model_dump()
    words = [found["name"], f"r{found['rank']}"]
    if found["name"] == "moc":
        words += [f"K{found['top_k']}", f"α{found['alpha']:g}"]
    if found.get("sites", "attn+ffn") != "attn+ffn":
        words.append(found["sites"])
    return " ".join(words)


def _metrics(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {key: score.get(key) for key in ("value", "stderr", "n", "majority")}
        for name, score in entry["metrics"].items()
    }


def _label(runs: Sequence[Run], wanted: str | None) -> str:
    """Choose the scores to compare."""
    known = list(dict.fromkeys(label for run in runs for label in run.scores))
    if wanted is not None:
        if wanted not in known:
            raise RunError(f"no run has scores called '{wanted}'{choices(wanted, known)}")
        return wanted
    scored = [run for run in runs if run.scores]
    common = [label for label in known if all(label in run.scores for run in scored)]
    kept = [label for label in common if label != FINAL]
    if not kept:
        return FINAL

    def worth(label: str) -> tuple[int, bool]:
        return min(run.scores[label].items for run in scored), label.startswith("rank")

    return max(kept, key=worth)


def _tasks(runs: Sequence[Run], label: str, wanted: Sequence[str]) -> list[str]:
    """The tasks to show; `mnli` stands for both of its parts."""
    scored = {run.name: run.scores[label].tasks for run in runs if label in run.scores}
    known = list(dict.fromkeys(task for tasks in scored.values() for task in tasks))
    chosen = [task for task in known if not wanted or any(_named(task, name) for name in wanted)]
    for name in wanted:
        if not any(_named(task, name) for task in known):
            raise RunError(f"no run was scored on '{name}'{choices(name, known)}")
    first = scored.get(runs[0].name)
    if first is not None:
        strangers = [
            name for name, tasks in scored.items() if not set(tasks) & set(first) & set(chosen)
        ]
        if strangers:
            listed = "; ".join(f"{name}: {', '.join(tasks)}" for name, tasks in scored.items())
            raise RunError(
                f"{', '.join(strangers)} has no task in common with {runs[0].name} ({listed})",
                "compare runs that were scored on the same tasks",
            )
    return chosen


def _named(task: str, name: str) -> bool:
    return task == name or task.startswith(f"{name} (")


def _items(run: Run, label: str, remarks: list[str]) -> dict[str, list[dict[str, Any]]]:
    try:
        return read_items(run.scores[label])
    except RunError as error:
        remarks.append(f"{error.message}: no items of {run.name} are used.")
        return {}


def _against(
    first: Run,
    run: Run,
    label: str,
    tasks: Sequence[str],
    items: dict[str, dict[str, list[dict[str, Any]]]],
) -> tuple[list[Difference], list[str]]:
    """Every task's difference of `run` to `first`, then that of the average."""
    ours, theirs = run.scores[label].tasks, first.scores[label].tasks
    shared = [task for task in tasks if task in ours and task in theirs]
    found, main, drawn, remarks = [], [], [], []
    for task in tasks:
        if task not in shared and (task in ours or task in theirs):
            lacking = first if task in ours else run
            remarks.append(f"{lacking.name} has no score of {task}: it is in no difference.")
    for task in shared:
        pairs = pair(items[first.name].get(task, []), items[run.name].get(task, []))
        remarks += _pairing(task, first, run, pairs.unpaired, pairs.relabelled)
        for metric, entry in _metrics(ours[task]).items():
            before = _metrics(theirs[task]).get(metric)
            if before is None or entry["value"] is None or before["value"] is None:
                continue
            paired = difference(run.name, task, metric, pairs)
            one = Difference(run.name, task, metric, entry["value"] - before["value"])
            if paired is not None:
                one = paired[0]
            found.append(one)
            if metric == ours[task]["metric"]:
                main.append(one)
                drawn += [] if paired is None else [paired[1]]
    if len(main) > 1:
        found.append(average_difference(run.name, main, drawn if len(drawn) == len(main) else []))
    return found, remarks


def _pairing(task: str, first: Run, run: Run, unpaired: int, relabelled: int) -> list[str]:
    said = []
    if unpaired:
        said.append(
            f"{task}: {unpaired:,} items stand in only one of {first.name} and {run.name}; "
            "the difference is on those that both have."
        )
    if relabelled:
        said.append(
            f"{task}: {relabelled:,} items of {first.name} and {run.name} have another label "
            "there than here, and are left out: the rows are not the same."
        )
    return said


def _missing(runs: Sequence[Run], program: str) -> list[str]:
    """The commands after which all runs have items under the same conditions."""
    made = [scores for run in runs for label, scores in run.scores.items() if label != FINAL]
    best = max(made, key=lambda scores: scores.items, default=None)
    commands = []
    for run in runs:
        if run.results is None or (best is not None and best.label in run.scores):
            continue
        words = [program, "eval", run.path]
        if best is not None and best.conditions.get("limit") is not None:
            words += ["--limit", str(best.conditions["limit"])]
        if best is not None and best.conditions.get("protocol") == "generate":
            words += ["--protocol", "generate"]
        commands.append(shlex.join(words))
    return commands
