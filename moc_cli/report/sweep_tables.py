"""What `moc sweep` shows: scores of each cell over its seeds, and differences to the reference."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from moc_cli.report.comparison_tables import difference_cells
from moc_cli.report.numbers import MISSING, decimal, duration, percent, score_text
from moc_cli.report.tables import FittedTable

Summary = Mapping[str, Any]
Rows = list[list[str | Text]]


def sweep_tables(summary: Summary) -> list[FittedTable]:
    """Show what `moc sweep --json` prints."""
    makers = (_search_table, _score_table, _cost_table, _difference_table)
    return [table for table in (make(summary) for make in makers) if table.rows]


def plan_table(runs: list[tuple[str, bool]]) -> FittedTable:
    """Show the names of runs, and whether each is finished."""
    rows: Rows = [[name, "finished" if finished else ""] for name, finished in runs]
    return FittedTable("Runs", ["run", ""], rows)


def _search_table(summary: Summary) -> FittedTable:
    """What chose a value: the best values on the validation rows, the chosen one in bold."""
    candidates = summary["candidates"]
    rows: Rows = []
    for row in summary["rows"]:
        for value, search in row["search"].items():
            metric = next(found["metric"] for found in search.values())
            chosen = row["cells"].get(value, {}).get("chosen")
            line: list[str | Text] = [line_name(row["name"], metric), value]
            for candidate in candidates:
                text = _found(search.get(candidate), len(summary["choose_seeds"]))
                line.append(Text(text, "bold" if candidate == chosen else ""))
            rows.append(line)
    seeds = ", ".join(map(str, summary["choose_seeds"]))
    mean = f"mean over seeds {seeds}" if "," in seeds else f"seed {seeds}"
    title = f"Search: best score on the validation rows, {mean}"
    return FittedTable(title, ["", summary["compared"], *candidates], rows)


def _found(search: Mapping[str, Any] | None, seeds: int) -> str:
    """Return a candidate's score in the search, with its number of seeds where some are missing."""
    if search is None:
        return MISSING
    text = score_text(search["metric"], search["mean"])
    done = len(search["seeds"])
    return text if done == seeds else f"{text} ({done} of {seeds} seeds)"


def _score_table(summary: Summary) -> FittedTable:
    values = _values(summary)
    rows: Rows = []
    for row in summary["rows"]:
        tasks = dict.fromkeys(task for cell in row["cells"].values() for task in cell["tasks"])
        for task in tasks:
            scores = [row["cells"].get(value, {}).get("tasks", {}).get(task) for value in values]
            metric = next(score["metric"] for score in scores if score)
            rows.append([line_name(row["name"], task, metric), *map(_score, scores)])
    if averages := averaged(summary):
        medians = [averages.get(value, {}).get("median") for value in values]
        texts = [score_text(summary["average"]["metric"], median) for median in medians]
        rows.append([Text(cell, "bold") for cell in (average_name(summary), *texts)])
    title = f"Scores{_scored_by(summary)}: median over seeds (lowest to highest)"
    return FittedTable(title, ["", *values], rows)


def _scored_by(summary: Summary) -> str:
    """Name the evaluations that the scores are of, by their folders; nothing without any."""
    labels = [cell["scored"] for row in summary["rows"] for cell in row["cells"].values()]
    named = [f"eval/{label}" for label in dict.fromkeys(labels) if label != "final"]
    return f" of {', '.join(named)}" if named else ""


def _score(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return MISSING
    metric, values = score["metric"], score["values"]
    text = score_text(metric, score["median"])
    if len(values) == 1:
        return text
    ends = " to ".join(score_text(metric, end) for end in (min(values), max(values)))
    return f"{text} ({ends})"


def _cost_table(summary: Summary) -> FittedTable:
    """What each cell cost, or where it was trained: times of other devices do not compare."""
    chosen = summary["chosen"]
    one_device = len(summary["conditions"]["device"]) == 1
    head = ["", summary["compared"], "seeds", "trained"]
    head.append("training time" if one_device else "device")
    if chosen:
        head.append(chosen.rpartition(".")[2])
    rows: Rows = []
    for row in summary["rows"]:
        for value, cell in row["cells"].items():
            seeds = ", ".join(map(str, cell["seeds"]))
            line = [row["name"], value, seeds, decimal(cell["trained"], 0)]
            line.append(duration(cell["seconds"]) if one_device else "; ".join(cell["devices"]))
            rows.append([*line, *([cell["chosen"] or MISSING] if chosen else [])])
    return FittedTable("Runs that count", head, rows)


def _difference_table(summary: Summary) -> FittedTable:
    rows: Rows = []
    without_items = False
    for row in summary["rows"]:
        for value, tasks in row["differences"].items():
            for task, entry in tasks.items():
                without_items |= entry["low"] is None
                label = line_name(row["name"], task)
                seeds = " and ".join(map(str, reversed(entry["seeds"])))
                rows.append([value, label, *difference_cells(entry, entry["mean"]), seeds])
    for value, entry in averaged(summary).items():
        if "difference" in entry:
            cells = difference_cells(entry, entry["difference"])
            rows.append([value, average_name(summary), *cells, ""])
    interval = f"{percent(summary['confidence'], 0)} interval"
    title = f"Difference to {summary['reference']}, of means over seeds"
    note = f"{MISSING}: an interval needs the items that `eval` in a sweep file keeps"
    notes = [note] if without_items else []
    return FittedTable(title, ["", "", "difference", interval, "seeds"], rows, notes=notes)


def averaged(summary: Summary) -> Mapping[str, Any]:
    """Return the averages by value; none where only one score of each value would be in them."""
    values: Mapping[str, Any] = summary["average"].get("values", {})
    return values if any(entry["tasks"] > 1 for entry in values.values()) else {}


def average_name(summary: Summary) -> str:
    """Name the average, with its rows where it is not of all."""
    rows = summary["average"]["rows"]
    return "average" if len(rows) == len(summary["rows"]) else f"average of {', '.join(rows)}"


def line_name(row: str, *parts: str) -> str:
    """Return the name of a line: a row's name, a task and a metric, each once and if it has one."""
    known = {"", *row.split()}  # a row is named by its values, of which the task may be one
    return " ".join([*filter(None, [row]), *(p for p in dict.fromkeys(parts) if p not in known)])


def _values(summary: Summary) -> list[str]:
    """Return the values that are compared, in their order."""
    return list(dict.fromkeys(value for row in summary["rows"] for value in row["cells"]))
