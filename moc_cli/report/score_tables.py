"""The scores of results.json as tables: those of a training, and those of `moc eval`.

Both read the same entries (moc_cli/results.py). What no task has gets no column.
"""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from moc_cli.report.numbers import MISSING, decimal, hundredths, score_text
from moc_cli.report.tables import FittedTable

Row = dict[str, str | Text]


def results_table(tasks: Mapping[str, Mapping[str, Any]]) -> FittedTable:
    """Show the scores of a training: before and after, with the best constant answer's."""
    columns = ["task", "metric", "before", "value", "±", "majority", "items"]
    return _table(_title(tasks), columns, _rows(tasks))


def evaluation_table(results: Mapping[str, Any]) -> FittedTable:
    """Show every task's scores, the base model's beside them where they are known.

    A metric that is the same for all tasks stands in the title.
    """
    tasks = results["tasks"]
    columns = ["task", "metric", "value", "±", "base", "majority", "items", "unparsed", "seconds"]
    if len(_metrics(tasks)) == 1:
        columns.remove("metric")
    rows = _rows(tasks)
    if len(tasks) > 1:
        average: Row = dict.fromkeys(columns, "")
        average |= {
            "task": f"average of {len(tasks)}",
            "value": Text(hundredths(results["average"]), "bold"),
            "items": "limited" if results["limited"] else "",
        }
        if results["average_of_base"] is not None:
            average["base"] = hundredths(results["average_of_base"])
        rows.append(average)
    conditions = [results["protocol"]]
    conditions += [results[key] for key in ("dtype", "device") if results.get(key)]
    sizes = sorted({entry["batch_size"] for entry in tasks.values()}, reverse=True)
    conditions.append(f"batches of {' or '.join(map(str, sizes))}")
    if results.get("train_on_inputs") is not None:
        inputs = "prompt and answer" if results["train_on_inputs"] else "the answer alone"
        conditions.append(f"trained on {inputs}")
    notes = [", ".join(conditions)]
    if results["limited"]:
        notes.append("limited: not all rows are scored, see items")
    sources = {entry["base_source"] for entry in tasks.values() if "base_source" in entry}
    if sources:
        notes.append(f"base: {', '.join(sorted(sources))}")
    halved = [name for name, entry in tasks.items() if entry["halved"]]
    if halved:
        notes.append(f"batches did not fit in memory and were halved: {', '.join(halved)}")
    return _table(_title(tasks), columns, rows, notes)


def _rows(tasks: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """Return a row for each metric of each task, its cells by heading."""
    rows: list[Row] = []
    for name, entry in tasks.items():
        for metric, score in entry["metrics"].items():
            row: Row = {
                "task": name,
                "metric": metric,
                "before": score_text(metric, score.get("before")),
                "value": Text(score_text(metric, score["value"]), "bold"),
                "±": score_text(metric, score["stderr"]),
                "majority": score_text(metric, score.get("majority")),
                "items": f"{score['n']:,}"
                + (f" of {entry['rows']:,}" if entry.get("limited") else ""),
                "seconds": decimal(entry["seconds"], 0),
            }
            if "base_source" in entry:
                row["base"] = score_text(metric, score.get("base"))
            if "unparsed" in entry:
                row["unparsed"] = decimal(entry["unparsed"], 0)
            rows.append(row)
    return rows


def _table(
    title: str, columns: list[str], rows: list[Row], notes: list[str] | None = None
) -> FittedTable:
    absent = {"base", "unparsed"} - {name for row in rows for name in row if row[name]}
    columns = [name for name in columns if name not in absent]
    cells = [[row.get(name, MISSING) for name in columns] for row in rows]
    return FittedTable(title, columns, cells, notes or [])


def _metrics(tasks: Mapping[str, Mapping[str, Any]]) -> set[str]:
    return {metric for entry in tasks.values() for metric in entry["metrics"]}


def _title(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    metrics = _metrics(tasks)
    if metrics == {"perplexity"}:
        return "Scores: perplexity"
    name = f": {next(iter(metrics))}" if len(metrics) == 1 else ""
    return f"Scores{name}, in %{', except the perplexity' if 'perplexity' in metrics else ''}"
