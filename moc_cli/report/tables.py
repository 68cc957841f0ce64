"""Results, memory, parameters and the use of the controls, as rich tables and as plain rows.

A function ending in `_rows` gives what `--json` prints; the one ending in `_table` shows the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich import box
from rich.table import Table
from rich.text import Text

BARS = " ▏▎▍▌▋▊▉█"
MISSING = "–"


class Bytes(Protocol):
    """Bytes of a run's parts; `kind` says what the peak measures."""

    @property
    def weights(self) -> int: ...
    @property
    def trainable(self) -> int: ...
    @property
    def optimizer(self) -> int: ...
    @property
    def peak(self) -> int: ...
    @property
    def kind(self) -> str: ...


class Parameters(Protocol):
    """Numbers of parameters; `share` is adapter / base."""

    @property
    def adapter(self) -> int: ...
    @property
    def modules(self) -> int: ...
    @property
    def base(self) -> int: ...
    @property
    def share(self) -> float: ...


def results_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """Show the scores of results.json in hundredths, a perplexity as it is, after and before
    training.
    """
    table = _table("Scores", "task", "metric", "before", "after", "± stderr", "majority", "rows")
    for task, entry in tasks.items():
        for metric, score in entry["metrics"].items():
            shown = [score[key] for key in ("before", "value", "stderr", "majority")]
            numbers = [score_text(metric, value) for value in shown]
            numbers[1] = f"[bold]{numbers[1]}[/bold]"
            table.add_row(_plain(task), _plain(metric), *numbers, f"{score['n']:,}")
    return table


def memory_rows(memory: Bytes) -> list[dict[str, Any]]:
    """Return the bytes of each part, and of the peak with what it measures."""
    parts = {
        "weights": memory.weights,
        "trainable": memory.trainable,
        "optimizer": memory.optimizer,
        memory.kind: memory.peak,
    }
    return [{"part": name, "bytes": count} for name, count in parts.items()]


def memory_table(memory: Bytes) -> Table:
    """Show the bytes of frozen weights, trainables, optimizer, and the peak."""
    table = _table("Memory", "part", "size")
    for row in memory_rows(memory):
        table.add_row(_plain(row["part"]), size(row["bytes"]))
    return table


def parameter_rows(counts: Parameters) -> list[dict[str, Any]]:
    """Return the numbers of parameters: the method's, the heads', the base's."""
    return [
        {"part": "controls and gates", "parameters": counts.adapter, "share": counts.share},
        {"part": "fresh modules", "parameters": counts.modules, "share": None},
        {"part": "base, frozen", "parameters": counts.base, "share": None},
    ]


def parameter_table(counts: Parameters) -> Table:
    """Show the trainable share of the base; heads are counted apart."""
    table = _table("Parameters", "part", "number", "share of base")
    for row in parameter_rows(counts):
        share = "" if row["share"] is None else f"{100 * row['share']:.3f} %"
        table.add_row(row["part"], f"{row['parameters']:,}", share)
    return table


def utilization_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each control of each pool: its share of all routed choices."""
    return [
        {"pool": pool, "control": name, "share": share, "dead": name in state["dead"]}
        for pool, state in summary.get("pools", {}).items()
        for name, share in zip(state["controls"], state["use"], strict=True)
    ]


def utilization_tables(summary: Mapping[str, Any], *, width: int = 100) -> list[Table]:
    """Show for each pool the use of its controls as bars, as many columns of them as fit."""
    tables = []
    for pool, state in summary.get("pools", {}).items():
        names, use = state["controls"], state["use"]
        longest = max((len(name) for name in names), default=0)
        columns = max(1, min((width - 2) // (longest + 17), 4, len(names)))
        rows = -(-len(names) // columns)
        top = max(use, default=0.0) or 1.0
        table = Table(
            title=_caption(pool, state), box=None, show_header=False, padding=(0, 1, 0, 0)
        )
        table.title_justify = "left"
        for _ in range(columns):
            table.add_column(no_wrap=True)
            table.add_column(no_wrap=True, width=8)
            table.add_column(no_wrap=True, justify="right", width=5)
        for row in range(rows):
            cells: list[Text] = []
            for index in range(row, len(names), rows):
                style = "red" if names[index] in state["dead"] else ""
                cells += [Text(names[index], style), Text(bar(use[index] / top, 8), "cyan")]
                cells += [Text(f"{100 * use[index]:.1f}%", style)]
            table.add_row(*cells)
        tables.append(table)
    return tables


def recipe_table(recipes: Sequence[tuple[str, str]]) -> Table:
    """Show the shipped recipes: name and purpose."""
    table = Table(box=box.SIMPLE)
    table.add_column("recipe", no_wrap=True)  # a name is there to be copied
    table.add_column("what it does")
    for name, summary in recipes:
        table.add_row(_plain(name), _plain(summary))
    return table


def bar(share: float, width: int) -> str:
    """Return a bar of at most `width` characters; any share above 0 shows."""
    eighths = max(round(8 * width * share), 1 if share > 0 else 0)
    full, rest = divmod(eighths, 8)
    return BARS[8] * full + (BARS[rest] if rest else "")


def hundredths(value: float | None) -> str:
    """Return a fraction as hundredths, 0.8312 as 83.1; a dash where there is none."""
    return MISSING if value is None or value != value else f"{100 * value:.1f}"


def score_text(metric: str, value: float | None) -> str:
    """Return a score, or its error, as tables show it: in hundredths, but for a perplexity."""
    if metric == "perplexity" and value is not None:
        return f"{value:,.2f}"
    return hundredths(value)


def size(count: float) -> str:
    """Return a number of bytes in decimal units, as 1.23 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Return a time as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def _caption(pool: str, state: Mapping[str, Any]) -> Text:
    dead = state["dead"]
    text = Text(f"Controls of the {pool} pool", "bold")
    text.append(f"  {state['decisions']:,} choices, {hundredths(state['local_share'])} % local, ")
    text.append(f"{len(dead)} of {len(state['controls'])} dead", "red" if dead else "")
    return text


def _table(title: str, *columns: str) -> Table:
    """A table whose first column is left-justified and numbers are right-justified."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    words = {"task", "metric", "part"}
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right")
    return table


def _plain(text: str) -> Text:
    """Return `text` as it is: brackets in a name are no markup."""
    return Text(text)
