"""The runs of a sweep side by side: each cell's scores over its seeds, and the differences to the
reference with intervals.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moc_cli.comparison.bootstrap import (
    CONFIDENCE,
    RESAMPLES,
    difference_of_means,
    interval,
    resample_scores,
)
from moc_cli.comparison.pairs import Item, pair, sides
from moc_cli.comparison.runs import FINAL, Items, Scores, evaluations, read_items
from moc_cli.errors import RunError
from moc_cli.results import LOWER_IS_BETTER, main_score
from moc_cli.run_files import Shape
from moc_cli.sweep.plan import Cell, PlannedRun, SweepPlan

VERSIONS = ("python", "torch", "transformers")


class Swept(Shape):
    """sweep.json."""

    sweep: str
    runs: list[dict[str, Any]]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Column:
    """One value of the compared group in one row of the table: the finished runs of its cell.

    `scores` are those of each run.
    """

    cell: Cell
    value: str
    runs: list[PlannedRun]
    scores: list[Scores]


def summarize_sweep(plan: SweepPlan) -> dict[str, Any]:
    """Return what sweep.json holds: every run, the scores of every cell, and the differences.

    A row is a combination of the groups that are not compared. Scores are main metrics, of the
    sweep's first evaluation (`eval`), so that an interval is of the same items; without one, of the
    training's own final scoring, which has no intervals.
    """
    sweep = plan.sweep
    group, finished = sweep.compared_group, [r for r in plan.runs if r.name in plan.finished]
    scores = {run.name: _scored(run) for run in finished}
    rows: dict[str, list[Column]] = {}
    for cell in sweep.cells:
        runs = plan.counting(cell)
        value = next((setting.name for setting in cell if setting.group == group), sweep.name)
        rows.setdefault(sweep.row(cell), []).append(
            Column(cell, value, runs, [scores[run.name] for run in runs])
        )
    table = [_row(row, columns, plan) for row, columns in rows.items()]
    average = average_of_rows(table, sweep.reference)
    for row in table:
        for tasks in row["differences"].values():
            for entry in tasks.values():
                del entry["resampled"]  # it was for the average only
    return {
        "sweep": sweep.name,
        "recipe": sweep.recipe,
        "set": list(sweep.common),
        "compared": group,
        "chosen": sweep.chosen_group,
        "candidates": [candidate.name for candidate in sweep.candidates if candidate],
        "choose_seeds": plan.tried_seeds() if sweep.chosen_group else [],
        "reference": sweep.reference,
        "finished": plan.done(),
        "needed": plan.total(),
        "conditions": _conditions(finished),
        "runs": [_run(run, scores[run.name]) for run in finished],
        "failed": plan.failed,
        "rows": table,
        "average": average,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
    }


def _conditions(runs: Sequence[PlannedRun]) -> dict[str, list[str]]:
    """Return on what the runs were trained: every device, version and commit among them."""
    values_of: dict[str, dict[str, None]] = {"device": {}, "commit": {}, "versions": {}}
    for run in runs:
        environment = run.results.read_environment()
        device, git = environment["device"], environment.get("git") or {}
        values_of["device"][device.get("name") or device["kind"]] = None
        values_of["commit"][f"{git.get('commit')}{' (changed)' if git.get('dirty') else ''}"] = None
        versions = environment["versions"]
        values_of["versions"][", ".join(f"{name} {versions[name]}" for name in VERSIONS)] = None
    return {key: list(values) for key, values in values_of.items()}


def _run(run: PlannedRun, scores: Scores) -> dict[str, Any]:
    results = run.results.read_results()
    return {
        "name": run.name,
        "settings": {setting.group: setting.name for setting in run.cell},
        "candidate": run.candidate and run.candidate.name,
        "seed": run.seed,
        "tasks": {task: main_score(e)["value"] for task, e in scores.tasks.items()},
        "validation": results.get("validation"),
        "trained": results["parameters"]["adapter"],
        "seconds": results["seconds"],
    }


def _row(name: str, columns: Sequence[Column], plan: SweepPlan) -> dict[str, Any]:
    """Return a row of the table: its cells by the value that is compared, and their differences."""
    filled = [column for column in columns if column.runs]
    cells = {column.value: _cell(column, plan) for column in filled}
    first = [column for column in filled if column.value == plan.sweep.reference]
    other_columns = [column for column in filled if column not in first]
    differences = _differences(first[0], other_columns, cells) if first else {}
    search = {column.value: found for column in columns if (found := _search(column.cell, plan))}
    return {"name": name, "cells": cells, "search": search, "differences": differences}


def _search(cell: Cell, plan: SweepPlan) -> dict[str, Any]:
    """Return what chose a cell's candidate: each one's best values on the validation rows.

    They are those of the finished runs. Empty where nothing is chosen.
    """
    search = {}
    for candidate, runs in plan.tried(cell).items():
        finished = [run for run in runs if run.name in plan.finished]
        found = [run.validation() for run in finished]
        if found:
            values = [value for _, value in found]
            search[candidate.name] = {
                "metric": found[0][0],
                "seeds": [run.seed for run in finished],
                "values": values,
                "mean": statistics.fmean(values),
            }
    return search


def _cell(column: Column, plan: SweepPlan) -> dict[str, Any]:
    results = [run.results.read_results() for run in column.runs]
    scores = [scored.tasks for scored in column.scores]
    chosen = plan.chosen(column.cell)
    tasks = {}
    for task, entry in scores[0].items():
        if not all(task in of_run for of_run in scores):
            continue
        values = [main_score(of_run[task])["value"] for of_run in scores]
        tasks[task] = {
            "metric": entry["metric"],
            "majority": main_score(entry).get("majority"),
            "values": values,
            "median": statistics.median(values),
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else None,
        }
    return {
        "tasks": tasks,
        "seeds": [run.seed for run in column.runs],
        "chosen": chosen.name if chosen else None,
        "scored": column.scores[0].label,
        "trained": results[0]["parameters"]["adapter"],
        "seconds": statistics.median(result["seconds"] for result in results),
        "devices": _conditions(column.runs)["device"],
    }


def _differences(
    reference: Column, other_columns: Sequence[Column], cells: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return each column's differences to the reference, by task.

    Each run is scored once on the resampled items of a task.
    """
    columns = [reference, *other_columns]
    items = {column.value: list(map(_items, column.scores)) for column in columns}
    differences: dict[str, dict[str, Any]] = {column.value: {} for column in other_columns}
    for task, first in cells[reference.value]["tasks"].items():
        anchor = items[reference.value][0].get(task, [])
        scores = _resampled(task, first["metric"], items, anchor)
        for value, entries in differences.items():
            if task in cells[value]["tasks"]:
                resampled = None
                if reference.value in scores and value in scores:
                    resampled = difference_of_means(task, scores[reference.value], scores[value])
                second = cells[value]["tasks"][task]
                entries[task] = _difference(first, second, resampled, len(anchor))
    return differences


def _difference(
    first: Mapping[str, Any], second: Mapping[str, Any], resampled: np.ndarray | None, items: int
) -> dict[str, Any]:
    """Return the difference of two cells' mean scores, with an interval over items and seeds.

    `resampled` are differences (R,) over so many items; None where the items are not kept.
    """
    low, high = (None, None) if resampled is None else interval(resampled)
    return {
        "metric": second["metric"],
        "mean": second["mean"] - first["mean"],
        "seeds": [len(first["values"]), len(second["values"])],
        "low": low,
        "high": high,
        "items": None if resampled is None else items,
        "resampled": resampled,
    }


def _resampled(
    task: str, metric: str, items: Mapping[str, Sequence[Items]], anchor: Sequence[Item]
) -> dict[str, np.ndarray]:
    """Return the resampled scores (S, R) of each column whose runs all hold the anchor's items."""
    labels, predictions = np.empty(0), dict[str, list[np.ndarray]]()
    for value, runs in items.items():
        pairs = [pair(anchor, run.get(task, [])) for run in runs]
        complete = [matched for matched in pairs if anchor and len(matched.second) == len(anchor)]
        columns = [
            side for side in (sides(metric, matched) for matched in complete) if side is not None
        ]
        if len(columns) == len(runs):
            labels = columns[0][0]
            predictions[value] = [second for _, _, second in columns]
    if not predictions:
        return {}
    scores = resample_scores(task, metric, labels, np.stack(sum(predictions.values(), [])))
    ends = np.cumsum([len(runs) for runs in predictions.values()])[:-1]
    return dict(zip(predictions, np.split(scores, ends), strict=True))


def _scored(run: PlannedRun) -> Scores:
    """Return a run's first evaluation; without one its training's own final scoring."""
    for label in run.evaluations:
        return evaluations(run.results)[label]
    results = run.results.read_results()
    return Scores(FINAL, results, results["tasks"])


def _items(scored: Scores) -> Items:
    """Return the items that scores are made from; none where they are not kept."""
    if scored.folder is None:
        return {}
    try:
        return read_items(scored)
    except RunError:
        return {}


def average_of_rows(table: Sequence[Mapping[str, Any]], reference: str | None) -> dict[str, Any]:
    """Return each value's mean over rows and tasks, and its difference to the reference.

    Only rows in which all values have runs count, and tasks that all have scored, so that all means
    are over the same. A perplexity has no average with other metrics.
    """
    values = list(dict.fromkeys(value for row in table for value in row["cells"]))
    if not values:
        return {}
    rows = [row for row in table if all(value in row["cells"] for value in values)]
    tasks = {row["name"]: _shared_tasks(row["cells"].values()) for row in rows}
    rows = [row for row in rows if tasks[row["name"]]]
    metrics = {metric for row in rows for metric in tasks[row["name"]].values()}
    if not rows or (len(metrics) > 1 and metrics & {*LOWER_IS_BETTER}):
        return {}
    metric = metrics.pop() if len(metrics) == 1 else ""
    names = [(row, task) for row in rows for task in tasks[row["name"]]]
    averages: dict[str, Any] = {}
    for value in values:
        medians = [row["cells"][value]["tasks"][task]["median"] for row, task in names]
        entry: dict[str, Any] = {"median": statistics.fmean(medians), "tasks": len(medians)}
        if reference in values and value != reference:
            parts = [row["differences"][value][task] for row, task in names]
            entry |= {"metric": metric, "low": None, "high": None}
            entry["difference"] = statistics.fmean(part["mean"] for part in parts)
            if all(part["resampled"] is not None for part in parts):
                joint = np.mean([part["resampled"] for part in parts], axis=0)
                entry["low"], entry["high"] = interval(joint)
        averages[value] = entry
    return {"rows": [row["name"] for row in rows], "metric": metric, "values": averages}


def _shared_tasks(cells: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the metric of each task that all cells have scored."""
    first, *others = [cell["tasks"] for cell in cells]
    return {
        task: entry["metric"]
        for task, entry in first.items()
        if all(task in other for other in others)
    }
