"""Runs side by side, and several seeds of one recipe, as rich tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from moc_cli.report.tables import MISSING, duration, hundredths, score_text, size

LABEL = 24  # characters of the first column
LEAST = 18  # characters that a run's column needs

Row = tuple[str, list[str]]


def comparison_tables(found: Mapping[str, Any], *, width: int = 100) -> list[Table]:
    """Show what `moc compare --json` prints: runs, their scores, differences to the first.

    Runs stand side by side, in as many tables as a terminal of this width needs.
    """
    runs = found["runs"]
    most = max(1, (min(width, 100) - LABEL) // LEAST)
    across = -(-len(runs) // -(-len(runs) // most))  # as evenly as that many tables allow
    tables = []
    for begin in range(0, len(runs), across):
        some = runs[begin : begin + across]
        part = "" if len(runs) <= across else f" {begin + 1} to {begin + len(some)} of {len(runs)}"
        tables.append(_facts_table(some, f"Runs{part}"))
        tables.append(_scores_table(some, found, f"Scores{part}, {_source(found['scores'])}"))
    tables += [_difference_table(run["name"], found) for run in runs[1:]]
    return [table for table in tables if table.row_count]


def seeds_table(found: Mapping[str, Any]) -> Table:
    """Show what `moc train --seeds --json` prints: every seed's scores, mean, spread, median."""
    keys = [(task, metric) for task, metrics in found["tasks"].items() for metric in metrics]
    table = _table(f"Scores of {len(found['seeds'])} seeds")
    table.add_column("seed", no_wrap=True)
    for task, metric in keys:
        table.add_column(Text(f"{task}\n{metric}"), justify="right", overflow="fold")
    averaged = len(found["tasks"]) > 1
    if averaged:
        table.add_column("average", justify="right")
    for one in found["seeds"]:
        cells = [score_text(metric, one["tasks"][task].get(metric)) for task, metric in keys]
        cells += [hundredths(one["average"])] if averaged else []
        median = one["seed"] == found["median"]["seed"]
        name = f"{one['seed']} (median)" if median else str(one["seed"])
        table.add_row(name, *cells, style="bold" if median else "")
    table.add_section()
    sums = [(metric, found["tasks"][task][metric]) for task, metric in keys]
    sums += [("average", found["average"])] if averaged else []
    table.add_row("mean ± std", *(_pair(name, one["mean"], one["std"]) for name, one in sums))
    if any(one["before"] is not None for _, one in sums):
        table.add_row("untrained", *(score_text(name, one["before"]) for name, one in sums))
    return table


def _facts_table(runs: Sequence[Mapping[str, Any]], title: str) -> Table:
    kinds = {run["memory_kind"] for run in runs if run["memory_kind"]}
    kind = kinds.pop() if len(kinds) == 1 else None
    rows: list[Row] = [
        ("method", [run["method"] for run in runs]),
        ("steps", [_steps(run) for run in runs]),
        ("trained, % of base", [_percent(run["share"], 3) for run in runs]),
        ("training time", [_or(duration, run["seconds"]) for run in runs]),
        ("tokens/s", [_or("{:,.0f}".format, run["tokens_per_second"]) for run in runs]),
        (kind or "peak memory", [_memory(run, kind is None) for run in runs]),
    ]
    pools = dict.fromkeys(pool for run in runs for pool in run["routing"])
    for pool in pools:
        states = [run["routing"].get(pool) for run in runs]
        name = "" if len(pools) == 1 else f" ({pool})"
        local = [_percent(state and state["local_share"], 1) for state in states]
        dead = [f"{one['dead']} of {one['controls']}" if one else MISSING for one in states]
        rows += [(f"routed to own, %{name}", local), (f"dead controls{name}", dead)]
    return _beside(title, [run["name"] for run in runs], rows)


def _scores_table(runs: Sequence[Mapping[str, Any]], found: Mapping[str, Any], title: str) -> Table:
    keys = dict.fromkeys(
        (task, metric) for run in runs for task, ms in run["tasks"].items() for metric in ms
    )
    rows: list[Row] = []
    for task, metric in keys:
        scores = [run["tasks"].get(task, {}).get(metric) for run in runs]
        rows.append(
            (
                f"{task} {metric}",
                [_pair(metric, one["value"], one["stderr"]) if one else MISSING for one in scores],
            )
        )
        best = {one["majority"] for one in scores if one and one["majority"] is not None}
        if len(best) == 1:
            rows.append(("  constant answer", [score_text(metric, best.pop())] * len(runs)))
    if len(found["averaged"]) > 1:
        cells = [hundredths(run["average"]) for run in runs]
        rows.append((f"average of {len(found['averaged'])}", cells))
    return _beside(title, [run["name"] for run in runs], rows)


def _difference_table(name: str, found: Mapping[str, Any]) -> Table:
    """A run against the first; a difference whose interval leaves 0 out is bold."""
    table = _table(f"{name} less {found['first']}")
    table.add_column("", overflow="fold")
    percent = f"{100 * found['confidence']:.0f} %"
    for column in (
        "difference",
        f"{percent} interval",
        "items",
        "only it\nright",
        "only first\nright",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for one in found["differences"]:
        if one["run"] != name:
            continue
        known = one["low"] is not None
        low, value, high = (_signed(one["metric"], one[key]) for key in ("low", "value", "high"))
        apart = known and not one["low"] <= 0 <= one["high"]
        table.add_row(
            Text(f"{one['task']} {one['metric']}".rstrip()),
            Text(value, "bold" if apart else ""),
            f"{low} to {high}" if known else MISSING,
            f"{one['items']:,}" if one["items"] else MISSING,
            _or("{:,}".format, one["only_this"]),
            _or("{:,}".format, one["only_first"]),
        )
    return table


def _beside(title: str, names: Sequence[str], rows: Sequence[Row]) -> Table:
    table = _table(title)
    table.add_column("", max_width=LABEL, overflow="fold")
    for name in names:
        table.add_column(Text(name), justify="right", overflow="fold", min_width=8)
    for label, cells in rows:
        style = "dim" if label.startswith(" ") else ""
        table.add_row(Text(label), *map(Text, cells), style=style)
    return table


def _table(title: str) -> Table:
    return Table(title=Text(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")


def _source(label: str) -> str:
    return "at the end of training" if label == "final" else f"of moc eval ({label})"


def _steps(run: Mapping[str, Any]) -> str:
    done = f"{run['step']:,}"
    return done if run["status"] == "finished" else f"{done}, {run['status']}"


def _memory(run: Mapping[str, Any], with_kind: bool) -> str:
    if run["peak_memory"] is None:
        return MISSING
    return size(run["peak_memory"]) + (f" ({run['memory_kind']})" if with_kind else "")


def _percent(share: float | None, digits: int) -> str:
    return MISSING if share is None else f"{100 * share:.{digits}f}"


def _pair(metric: str, value: float | None, spread: float | None) -> str:
    return score_text(metric, value) + (
        "" if spread is None else f" ± {score_text(metric, spread)}"
    )


def _signed(metric: str, value: float | None) -> str:
    """A difference with its sign; one that rounds to nothing has none."""
    if value is None:
        return MISSING
    text = score_text(metric, value)
    if not text.strip("-0."):
        return text.removeprefix("-")
    return text if value < 0 else f"+{text}"


def _or(shown: Any, value: Any) -> str:
    return MISSING if value is None else str(shown(value))
