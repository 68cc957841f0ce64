"""What lm-evaluation-harness found, as a table: its own metrics, in its own units."""

from collections.abc import Mapping
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from moc_cli.report.tables import MISSING

WORDS = ("task", "metric")


def harness_table(results: Mapping[str, Any]) -> Table:
    """Show every metric of every task; subtasks stand below their group, indented."""
    based = any("base_source" in entry for entry in results["tasks"].values())
    columns = ["task", "shots", "metric", "value", "±", *(["base"] if based else [])]
    columns += ["items", "seconds"]
    table = Table(
        title="lm-evaluation-harness",
        title_justify="left",
        title_style="bold",
        caption=_caption(results),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in columns:
        word = name in WORDS
        side: Literal["left", "right"] = "left" if word else "right"
        table.add_column(name, justify=side, no_wrap=not word, overflow="fold")
    for name, entry in _ordered(results["tasks"]):
        for row in _rows(name, entry):
            table.add_row(*(row[column] for column in columns))
    return table


def _ordered(tasks: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Groups before their subtasks, otherwise as they were asked for."""
    found: list[tuple[str, Mapping[str, Any]]] = []

    def add(name: str, entry: Mapping[str, Any]) -> None:
        found.append((name, entry))
        for child, inner in tasks.items():
            if inner.get("part_of") == name:
                add(child, inner)

    for name, entry in tasks.items():
        if entry.get("part_of") not in tasks:
            add(name, entry)
    return found


def _rows(name: str, entry: Mapping[str, Any]) -> list[dict[str, Text]]:
    rows = []
    for place, (metric, score) in enumerate(entry["metrics"].items()):
        shots = entry.get("num_fewshot")
        cells = {
            "task": ("  " if "part_of" in entry else "") + name,
            "shots": MISSING if shots is None else str(shots),
            "metric": metric,
            "value": number(score["value"]),
            "±": number(score["stderr"]),
            "base": number(score.get("base")),
            "items": f"{score['n']:,}" + (f" of {entry['rows']:,}" if entry["limited"] else ""),
            "seconds": f"{entry['seconds']:,.0f}",
        }
        if place:
            cells |= {"task": "", "shots": "", "seconds": ""}
        rows.append({key: Text(text) for key, text in cells.items()})
        rows[-1]["value"].stylize("bold")
    return rows


def number(value: float | None) -> str:
    """Four digits after the point, as lm_eval shows them; large ones are shorter."""
    if value is None:
        return MISSING
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _caption(results: Mapping[str, Any]) -> Text:
    """How the numbers came about, and what is missing in them."""
    entries = results["tasks"].values()
    told = [f"lm_eval {results['lm_eval_version']}"]
    told += [results[key] for key in ("dtype", "device") if results.get(key)]
    sizes = sorted({entry["batch_size"] for entry in entries}, reverse=True)
    told.append(f"batches of {' or '.join(map(str, sizes))}; only contexts vote on routes")
    lines = [", ".join(told)]
    if results["limited"]:
        lines.append(f"limited: the first {results['limit']} rows of each task")
    cut = max((entry["cut"] for entry in entries), default=0)
    if cut:
        lines.append(f"{cut:,} contexts were longer than the model takes: their ends were kept")
    return Text("\n".join(lines), "dim")
