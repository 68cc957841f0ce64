"""Tables of a routing.json: the whole, its sites, controls, tasks, another run, one text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moc_cli.report.output import printable
from moc_cli.report.tables import MISSING, hundredths

ROWS = 16  # of a table at most; all is in routing.json
TOKENS = 60


def summary_table(routing: Mapping[str, Any]) -> RenderableType:
    """Show what holds for the whole model, beside what chance or an even use would give."""
    found = routing["summary"]
    pools = [site["pool"] for site in routing["sites"]]
    sizes = [pools.count(pool) for pool in dict.fromkeys(pools)]
    size = sum(sizes) / len(sizes)
    dead = found["dead"]
    table = _table("Routing", "what", "found", "even or by chance")
    for name, value, chance in (
        ("local choices", _percent(found["local_share"]), _percent(found["chance_local"])),
        ("attention → FFN", _percent(found["attn_to_ffn"]), _even(routing, "attn", "ffn")),
        ("FFN → attention", _percent(found["ffn_to_attn"]), _even(routing, "ffn", "attn")),
        ("entropy of the gate, nats", f"{found['gate_entropy']:.3f}", f"{math.log(size):.3f}"),
        ("lead of the chosen, in probability", f"{found['margin']:.4f}", "0"),
        ("entropy of use, nats", f"{found['use_entropy']:.3f}", f"{math.log(size):.3f}"),
        ("effective controls", f"{found['effective']:.1f}", f"{size:g}"),
        ("dead controls", str(len(dead)), "0"),
    ):
        table.add_row(name, value, chance)
    return _noted(table, "never chosen: " + _some(dead, 12) if dead else None)


def site_table(routing: Mapping[str, Any]) -> RenderableType:
    """Show the sites whose update weighs most beside their block's output, in their order."""
    rows = routing["per_site"]
    names = [site["name"] for site in routing["sites"]]
    chosen = sorted(range(len(rows)), key=lambda i: -rows[i]["relative_size"])[:ROWS]
    head = ("share %", "local %", "effective", "entropy", "lead", "one token %", "size %")
    table = _table("Sites", "site", "top", *head, gap=0)
    for index in sorted(chosen):
        row = rows[index]
        table.add_row(
            row["name"],
            row["top"],
            hundredths(routing["share"][index][names.index(row["top"])]),
            hundredths(row["local_share"]),
            f"{row['effective']:.1f}",
            f"{row['gate_entropy']:.3f}",
            f"{row['margin']:.4f}",
            hundredths(row["one_token"]),
            hundredths(row["relative_size"]),
        )
    note = "share: of top; lead: in mean probability; size: update / block's output"
    return _capped(table, len(rows), "sites, those of the largest update", note=note)


def control_table(routing: Mapping[str, Any]) -> RenderableType:
    """Show the controls that are chosen most."""
    rows = sorted(routing["per_control"], key=lambda row: -row["use"])
    names = [site["name"] for site in routing["sites"]]
    table = _table("Controls", "control", "share of all choices", "norm of B A", "most by site")
    for row in rows[:ROWS]:
        column = names.index(row["name"])
        most = max(range(len(names)), key=lambda i: routing["share"][i][column])
        share = routing["share"][most][column]
        most_text = f"{names[most]} ({_percent(share)})" if share else MISSING
        style = "red" if row["dead"] else ""
        table.add_row(
            row["name"], _percent(row["use"]), f"{row['norm']:.3f}", most_text, style=style
        )
    return _capped(table, len(rows), "controls, the most chosen")


def distance_table(routing: Mapping[str, Any]) -> RenderableType:
    """Show how far apart the tasks' routes are: 0 the same, 1 nothing shared."""
    found = routing["task_distance"]
    names = found["tasks"][:8]
    table = _table("Distance of the tasks' routes", "task", *names)
    for name, row in zip(names, found["matrix"], strict=False):
        table.add_row(name, *(f"{value:.3f}" for value in row[:8]))
    note = "0: the same, 1: none shared; Jensen-Shannon, mean over the sites"
    return _capped(table, len(found["tasks"]), "tasks", shown=8, note=note)


def comparison_table(routing: Mapping[str, Any]) -> RenderableType:
    """Show the sites that differ most from the other run's."""
    found = routing["compare"]
    names = [site["name"] for site in routing["sites"]]
    mean = sum(found["distance"]) / len(names)
    name = printable(found["run"])
    table = _table(
        f"Against {name}: distance {mean:.3f}", "site", "distance", "more here", "less here"
    )
    order = sorted(range(len(names)), key=lambda i: -found["distance"][i])
    for index in order[:ROWS]:
        row = found["difference"][index]
        up, down = row.index(max(row)), row.index(min(row))
        table.add_row(
            names[index],
            f"{found['distance'][index]:.3f}",
            f"{names[up]} {100 * row[up]:+.1f}" if row[up] > 0 else MISSING,
            f"{names[down]} {100 * row[down]:+.1f}" if row[down] < 0 else MISSING,
        )
    note = "distance: 0 the same, 1 none shared; more and less: in points of the site's choices"
    return _capped(table, len(names), "sites, the most different", note=note)


def ablation_table(routing: Mapping[str, Any]) -> RenderableType:
    """Show the sites at which the loss changes most when their routes are made local."""
    rows = sorted(routing["ablation"], key=lambda row: -abs(row["loss_change"]))
    table = _table(
        "Loss of the answers with one site made local", "site", "change, nats", "± stderr", ""
    )
    for row in rows[:ROWS]:
        error = row["stderr"]
        sure = error is not None and abs(row["loss_change"]) > 2 * error
        table.add_row(
            row["site"],
            f"{row['loss_change']:+.5f}",
            MISSING if error is None else f"{error:.5f}",
            "beyond 2 stderr" if sure else "",
        )
    return _capped(table, len(rows), "sites, the largest changes")


def token_tables(
    routing: Mapping[str, Any], *, width: int = 100, site: str | None = None
) -> list[RenderableType]:
    """Show each token's own vote: at one site, or at as many sites as fit side by side."""
    names = [entry["name"] for entry in routing["sites"]]
    if site is not None:
        return [_votes_at(routing, names.index(site))]
    longest = max(len(name) for name in names) + 3
    return [_votes(routing, list(range(max(1, min(len(names), (width - 20) // longest)))))]


def _votes_at(routing: Mapping[str, Any], index: int) -> RenderableType:
    found, names = routing["tokens"], [entry["name"] for entry in routing["sites"]]
    choice = [names[control] for control in _choice(routing, index)]
    head = f"Votes at {names[index]}"
    if choice:
        head += f": chosen {', '.join(choice)}, by a lead of {found['margin'][index]:.4f}"
    table = _table(head, "token", "its vote", "probability", "")
    for number, token in enumerate(found["tokens"][:TOKENS]):
        vote = names[found["votes"][index][number]]
        probability = f"{found['probability'][index][number]:.4f}"
        table.add_row(_token(token), vote, probability, "✓" if vote in choice else "")
    return _capped(table, len(found["tokens"]), "tokens, the first", shown=TOKENS)


def _votes(routing: Mapping[str, Any], shown: Sequence[int]) -> RenderableType:
    found, names = routing["tokens"], [entry["name"] for entry in routing["sites"]]
    table = _table("Each token's vote, by site", "token", *(names[index] for index in shown))
    for number, token in enumerate(found["tokens"][:TOKENS]):
        votes = [Text(names[found["votes"][i][number]]) for i in shown]
        for index, vote in zip(shown, votes, strict=True):
            if found["votes"][index][number] in _choice(routing, index):
                vote.stylize("bold green")
        table.add_row(_token(token), *votes)
    table.add_section()
    if any(_choice(routing, index) for index in shown):
        chosen = [", ".join(names[k] for k in _choice(routing, index)) for index in shown]
        table.add_row("chosen", *chosen, style="bold")
    table.add_row("lead", *(f"{found['margin'][index]:.4f}" for index in shown))
    notes = []
    if len(shown) < len(names):
        notes.append(f"{len(shown)} of {len(names)} sites fit; --site {names[-1]} shows another")
    if len(found["tokens"]) > TOKENS:
        notes.append(f"the first {TOKENS} of {len(found['tokens'])} tokens")
    return _noted(table, "; ".join(notes) or None)


def _choice(routing: Mapping[str, Any], index: int) -> list[int]:
    """The site's one choice for the text; none where each token has its own."""
    return [] if routing["level"] == "token" else list(routing["tokens"]["choice"][index])


def _even(routing: Mapping[str, Any], block: str, other: str) -> str:
    """The share of `other` controls in the pools of the `block` sites."""
    shares = []
    for site in routing["sites"]:
        if site["block"] == block:
            pool = [entry["block"] for entry in routing["sites"] if entry["pool"] == site["pool"]]
            shares.append(pool.count(other) / len(pool))
    return _percent(sum(shares) / len(shares)) if any(shares) else MISSING


def _percent(value: float | None) -> str:
    text = hundredths(value)
    return text if text == MISSING else f"{text} %"


def _some(names: Sequence[str], most: int) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _token(token: str) -> Text:
    return Text(printable(token).replace("\n", "\\n").replace(" ", "·"))


def _capped(
    table: Table, total: int, what: str, *, shown: int = ROWS, note: str | None = None
) -> RenderableType:
    parts = [note] if note else []
    if total > shown:
        parts.append(f"{shown} of {total} {what}; all are in routing.json")
    return _noted(table, "\n".join(parts) or None)


def _noted(table: Table, note: str | None) -> RenderableType:
    """The table with a note below, which is not broken to the table's width."""
    return table if note is None else Group(table, Text(note, "dim"), Text())


def _table(title: str, *columns: str, gap: int = 2) -> Table:
    """A table of `gap` more spaces between columns; words are left-justified, numbers right."""
    table = Table(
        title=Text(title, no_wrap=True, overflow="ignore"),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        padding=(0, gap, 0, 0),
        pad_edge=False,
    )
    words = {"what", "site", "control", "task", "token", "its vote", "most by site", "top"}
    for name in columns:
        table.add_column(name, justify="left" if name in words else "right", no_wrap=True)
    return table
