"""Runs side by side, and several seeds of one recipe, as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from moc_cli.report.numbers import (
    MISSING,
    byte_size,
    decimal,
    duration,
    hundredths,
    percent,
    score_text,
)
from moc_cli.report.tables import LABEL, FittedTable

RUN_WIDTH = 17  # characters of a run's column

Rows = list[list[str | Text]]


def comparison_tables(comparison: Mapping[str, Any], *, width: int = 100) -> list[FittedTable]:
    """Show what `moc compare --json` prints: runs, their scores, differences to the first.

    Runs stand side by side, in as many tables as a terminal of this width needs.
    """
    runs = comparison["runs"]
    max_columns = max(1, (min(width, 100) - LABEL) // (RUN_WIDTH + 1))
    across = -(-len(runs) // -(-len(runs) // max_columns))  # as evenly as that many tables allow
    label = comparison["scores"]
    source = "at the end of training" if label == "final" else f"of moc eval ({label})"
    tables = []
    for begin in range(0, len(runs), across):
        group = runs[begin : begin + across]
        part = "" if len(runs) <= across else f" {begin + 1} to {begin + len(group)} of {len(runs)}"
        head = ["", *(run["name"] for run in group)]
        for title, rows in (
            (f"Runs{part}", _cost_rows(group)),
            (f"Scores{part}, {source}", _score_rows(group, comparison["averaged"])),
        ):
            tables.append(FittedTable(title, head, rows, column_width=RUN_WIDTH))
    tables += [_difference_table(run["name"], comparison) for run in runs[1:]]
    return [table for table in tables if table.rows]


def seeds_table(summary: Mapping[str, Any]) -> FittedTable:
    """Show what `moc train --seeds --json` prints: every seed's scores, mean, spread, median."""
    keys = [(task, metric) for task, metrics in summary["tasks"].items() for metric in metrics]
    spreads = [(metric, summary["tasks"][task][metric]) for task, metric in keys]
    head = ["seed", *(f"{task}\n{metric}" for task, metric in keys)]
    averaged = len(summary["tasks"]) > 1
    if averaged:
        head.append("average")
        spreads.append(("average", summary["average"]))
    rows: Rows = []
    for run in summary["seeds"]:
        median = run["seed"] == summary["median"]["seed"]
        row = [f"{run['seed']} (median)" if median else str(run["seed"])]
        row += [score_text(metric, run["tasks"][task].get(metric)) for task, metric in keys]
        row += [hundredths(run["average"])] if averaged else []
        rows.append([Text(cell, "bold" if median else "") for cell in row])
    totals: Rows = [["mean ± std"], ["untrained"]]
    for metric, spread in spreads:
        totals[0].append(_with_error(metric, spread["mean"], spread["std"]))
        totals[1].append(score_text(metric, spread["before"]))
    if all(spread["before"] is None for _, spread in spreads):
        totals.pop()
    title = f"Scores of {len(summary['seeds'])} seeds"
    return FittedTable(title, head, rows + totals, totals=len(totals))


def _cost_rows(runs: Sequence[Mapping[str, Any]]) -> Rows:
    kinds = {run["memory_kind"] for run in runs if run["memory_kind"]}
    kind = kinds.pop() if len(kinds) == 1 else None
    steps, memory = [], []
    for run in runs:
        status = "" if run["status"] == "finished" else f", {run['status']}"
        steps.append(f"{run['step']:,}{status}")
        measured = f" ({run['memory_kind']})" if run["memory_kind"] and kind is None else ""
        memory.append(byte_size(run["peak_memory"]) + measured)
    rows: Rows = [
        ["method", *(run["method"] for run in runs)],
        ["steps", *steps],
        ["trained, % of base", *(hundredths(run["share"], 3) for run in runs)],
        ["training time", *(duration(run["seconds"]) for run in runs)],
        ["tokens/s", *(decimal(run["tokens_per_second"], 0) for run in runs)],
        [kind or "peak memory", *memory],
    ]
    pools = dict.fromkeys(pool for run in runs for pool in run["routing"])
    for pool in pools:
        states = [run["routing"].get(pool) for run in runs]
        name = "" if len(pools) == 1 else f" ({pool})"
        local = [hundredths(state and state["local_share"]) for state in states]
        dead = [f"{state['dead']} of {state['controls']}" if state else MISSING for state in states]
        rows += [[f"routed to own, %{name}", *local], [f"dead controls{name}", *dead]]
    return rows


def _score_rows(runs: Sequence[Mapping[str, Any]], averaged: Sequence[str]) -> Rows:
    keys = dict.fromkeys(
        (task, metric)
        for run in runs
        for task, metrics in run["tasks"].items()
        for metric in metrics
    )
    rows: Rows = []
    for task, metric in keys:
        scores = [run["tasks"].get(task, {}).get(metric) for run in runs]
        cells = [
            _with_error(metric, score["value"], score["stderr"]) if score else MISSING
            for score in scores
        ]
        rows.append([f"{task} {metric}", *cells])
        majorities = {score["majority"] for score in scores if score} - {None}
        if len(majorities) == 1:
            text = score_text(metric, majorities.pop())
            rows.append([Text(cell, "dim") for cell in ("  majority", *[text] * len(runs))])
    if len(averaged) > 1:
        rows.append([f"average of {len(averaged)}", *(hundredths(run["average"]) for run in runs)])
    return rows


def _difference_table(name: str, comparison: Mapping[str, Any]) -> FittedTable:
    """A run against the first."""
    interval = f"{percent(comparison['confidence'], 0)} interval"
    head = ["", "difference", interval, "items", "only it\nright", "only first\nright"]
    rows: Rows = []
    for difference in comparison["differences"]:
        if difference["run"] != name:
            continue
        rows.append(
            [
                f"{difference['task']} {difference['metric']}".rstrip(),
                *difference_cells(difference, difference["value"]),
                decimal(difference["items"] or None, 0),
                decimal(difference["only_this"], 0),
                decimal(difference["only_first"], 0),
            ]
        )
    return FittedTable(f"{name} minus {comparison['first']}", head, rows)


def difference_cells(entry: Mapping[str, Any], value: float) -> tuple[Text, str]:
    """Return a difference and its interval; it is bold where the interval does not contain 0."""
    metric, low, high = entry.get("metric", ""), entry["low"], entry["high"]
    if low is None:
        return Text(_signed(metric, value)), MISSING
    difference = Text(_signed(metric, value), "" if low <= 0 <= high else "bold")
    return difference, f"{_signed(metric, low)} to {_signed(metric, high)}"


def _with_error(metric: str, value: float | None, error: float | None) -> str:
    text = score_text(metric, value)
    return text if error is None else f"{text} ± {score_text(metric, error)}"


def _signed(metric: str, value: float) -> str:
    """Return a difference with its sign; one that rounds to 0 has none."""
    text = score_text(metric, value)
    if not text.strip("-0."):
        return text.removeprefix("-")
    return text if value < 0 else f"+{text}"
