"""What `moc eval` wrote to results.json, as a table that reads well in 80 columns."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from moc_cli.report.tables import MISSING, hundredths, score_text

WORDS = ("task", "metric")


def evaluation_table(results: Mapping[str, Any]) -> Group:
    """Show every task's scores in hundredths, the base model's beside them where it is known.

    Numbers never wrap: where the columns do not fit, names do. What is nowhere known has no column;
    a metric that is everywhere the same stands in the title.
    """
    entries = results["tasks"].values()
    based = any("base_source" in entry for entry in entries)
    parsed = any("unparsed" in entry for entry in entries)
    metrics = {name for entry in entries for name in entry["metrics"]}
    columns = ["task", *(["metric"] if len(metrics) > 1 else []), "value", "±"]
    columns += [*(["base"] if based else []), "majority", "items"]
    columns += [*(["unparsed"] if parsed else []), "seconds"]
    table = Table(
        title=_title(metrics),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in columns:
        word = name in WORDS
        table.add_column(name, justify="left" if word else "right", no_wrap=not word)
    for row in _rows(results):
        table.add_row(*(row[name] for name in columns))
    return Group(table, _caption(results))  # a table's own caption would wrap at its width


def _title(metrics: set[str]) -> str:
    if metrics == {"perplexity"}:
        return "Scores: perplexity"
    but = ", but for the perplexity" if "perplexity" in metrics else ""
    return f"Scores: {next(iter(metrics))}, in %" if len(metrics) == 1 else f"Scores, in %{but}"


def _rows(results: Mapping[str, Any]) -> list[dict[str, Text]]:
    rows = []
    for name, entry in results["tasks"].items():
        for metric, score in entry["metrics"].items():
            items = f"{score['n']:,}" + (f" of {entry['rows']:,}" if entry["limited"] else "")
            cells = {
                "task": name,
                "metric": metric,
                "value": score_text(metric, score["value"]),
                "±": score_text(metric, score["stderr"]),
                "base": score_text(metric, score.get("base")),
                "majority": score_text(metric, score["majority"]),
                "items": items,
                "unparsed": f"{entry['unparsed']:,}" if "unparsed" in entry else MISSING,
                "seconds": f"{entry['seconds']:,.0f}",
            }
            rows.append({key: Text(text) for key, text in cells.items()})
            rows[-1]["value"].stylize("bold")
    if len(results["tasks"]) > 1:
        rows.append(_average(results))
    return rows


def _average(results: Mapping[str, Any]) -> dict[str, Text]:
    """The mean of the main values; a limited one says so in its own row."""
    cells = dict.fromkeys(("metric", "±", "majority", "unparsed", "seconds"), "")
    cells |= {
        "task": f"average of {len(results['tasks'])}",
        "value": hundredths(results["average"]),
        "base": hundredths(results["average_of_base"]),
        "items": "limited" if results["limited"] else "",
    }
    return {key: Text(text, "bold" if key == "value" else "") for key, text in cells.items()}


def _caption(results: Mapping[str, Any]) -> Text:
    """How the numbers came about: protocol, type, limit, batch sizes, where the base's are from."""
    entries = results["tasks"].values()
    lines = [_how(results)]
    if results["limited"]:
        lines.append("limited: not all rows are scored, see items")
    sources = sorted({entry["base_source"] for entry in entries if "base_source" in entry})
    if sources:
        lines.append(f"base: {', '.join(sources)}")
    halved = [name for name, entry in results["tasks"].items() if entry["halved"]]
    if halved:
        lines.append(f"batches did not fit in memory and were halved: {', '.join(halved)}")
    return Text("\n".join(lines), "dim")


def _how(results: Mapping[str, Any]) -> str:
    told = [results["protocol"]]
    told += [results[key] for key in ("dtype", "device") if results.get(key)]
    sizes = sorted({entry["batch_size"] for entry in results["tasks"].values()}, reverse=True)
    told.append(f"batches of {' or '.join(map(str, sizes))}")
    if results.get("train_on_inputs") is not None:
        on = "prompt and answer" if results["train_on_inputs"] else "the answer alone"
        told.append(f"trained on {on}")
    return ", ".join(told)
