"""What `moc inspect-routing` shows in a terminal: the map of sites and controls, and tables.

Everything comes from the dict of routing.json; the `_rows` functions serve its page too.
"""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from moc_cli.report.characters import printable
from moc_cli.report.numbers import MISSING, decimal, hundredths, percent
from moc_cli.report.tables import FittedTable

Routing = Mapping[str, Any]
HeadedRows = tuple[list[str], list[list[str]]]  # the headings, and the cells of each row

# Shares of 0, 1/8, ... 1 after a square root, so that small ones can be told apart.
RAMP = " .:-=+*#@"
SCALE = (
    (28, 28, 36),
    (44, 37, 84),
    (83, 39, 118),
    (128, 43, 125),
    (174, 52, 114),
    (216, 76, 92),
    (245, 123, 78),
    (252, 183, 110),
    (252, 245, 190),
)
WIDEST = 4  # characters of one control in the map
SHOWN = 16  # rows of a table at most; all are in routing.json
TOKENS = 60


def routing_views(
    routing: Routing, *, width: int = 100, colored: bool = True, site: str | None = None
) -> list[RenderableType]:
    """Return all that there is to show of a routing, at most `width` columns wide."""
    if routing["tokens"] is not None:
        views = [token_view(routing, width, site)]
    else:
        views = [heat_map(routing, width=width, colored=colored)]
    views += [summary_view(routing), site_view(routing), control_view(routing)]
    if routing["task_distance"]["matrix"]:
        views.append(distance_view(routing))
    if routing["compare"] is not None:
        views.append(comparison_view(routing))
    if routing["ablation"] is not None:
        views.append(ablation_view(routing))
    return views


def heat_map(routing: Routing, *, width: int = 100, colored: bool = True) -> RenderableType:
    """Draw each site's shares: a row for a site (two in one line with colours), left to right
    the controls. Where the controls are more than the columns, neighbours are summed.
    """
    sites = routing["sites"]
    names = [site["name"] for site in sites]
    step = 2 if colored else 1
    labels = []
    for row in range(0, len(names), step):
        label = names[row]
        if colored and row + 1 < len(names):
            layer, _, block = names[row + 1].partition(".")
            label += f" {block if label.startswith(f'{layer}.') else names[row + 1]}"
        labels.append(label)
    label_width = max(map(len, labels)) + 1
    room = max(8, min(width, 100) - label_width - 1)
    joined = -(-len(names) // room)
    columns = -(-len(names) // joined)
    cell = max(1, min(WIDEST, room // columns))

    # The layers' numbers stand over their first columns, as many as fit side by side.
    axis, free = [" "] * (label_width + columns * cell + 4), 0
    for index in range(0, len(sites), joined):
        layer, place = str(sites[index]["layer"]), label_width + index // joined * cell
        new = index == 0 or sites[index]["layer"] != sites[index - joined]["layer"]
        if new and place >= free:
            axis[place : place + len(layer)] = layer
            free = place + len(layer) + 1

    title = Text("Which control each site chooses", "bold")
    title.append(f"  {routing['decisions']:,} decisions a site", "not bold")
    summed = f", {joined} a column" if joined > 1 else ""
    title.append(f"\nrows: sites; columns: controls, numbered by layer{summed}", "not bold dim")
    lines = [title, Text("".join(axis).rstrip(), "dim", no_wrap=True)]
    table = [
        [sum(row[first : first + joined]) for first in range(0, len(row), joined)]
        for row in routing["share"]
    ]
    for label, row in zip(labels, range(0, len(names), step), strict=True):
        line = Text(label.ljust(label_width), no_wrap=True)
        below = table[row + 1] if colored and row + 1 < len(names) else None
        for column, share in enumerate(table[row]):
            if colored:
                under = _color(below[column]) if below is not None else "default"
                line.append("▀" * cell, f"{_color(share)} on {under}")
            else:
                line.append(RAMP[_level(share)] * cell)
        lines.append(line)
    legend = Text("share of choices: 0 ", "dim")
    for level in range(1, len(RAMP)):
        color = "rgb({},{},{}) ".format(*SCALE[level]) if colored else ""
        legend.append("██" if colored else RAMP[level], f"{color}not dim")
    legend.append(" 100 %; the diagonal: a site's own control")
    return Group(*lines, legend, Text())


def _level(share: float) -> int:
    """The step of the scale; any share above 0 is seen."""
    return max(1, round((len(RAMP) - 1) * math.sqrt(min(share, 1.0)))) if share > 0 else 0


def _color(share: float) -> str:
    return "rgb({},{},{})".format(*SCALE[_level(share)])


def summary_rows(routing: Routing) -> HeadedRows:
    """Return what holds for the whole model, beside what chance or an even use would give."""
    summary = routing["summary"]
    pools = [site["pool"] for site in routing["sites"]]
    size = len(pools) / len(set(pools))
    excluded = int(summary["chance_local"] == 0)  # a site's own control, by exclude_local

    def even(controls: float) -> str:
        return f"{math.log(controls):.3f}"

    def crossing(block: str, other_block: str) -> list[str]:
        """The share of `other_block` controls in the choices and the pools of `block` sites."""
        shares = []
        for site in routing["sites"]:
            if site["block"] == block:
                pool = [
                    entry["block"] for entry in routing["sites"] if entry["pool"] == site["pool"]
                ]
                shares.append(pool.count(other_block) / (len(pool) - excluded))
        chance = percent(sum(shares) / len(shares)) if any(shares) else MISSING
        return [percent(summary[f"{block}_to_{other_block}"]), chance]

    return ["what", "value", "by chance"], [
        ["local choices", percent(summary["local_share"]), percent(summary["chance_local"])],
        ["attention → FFN", *crossing("attn", "ffn")],
        ["FFN → attention", *crossing("ffn", "attn")],
        ["entropy of the gate, nats", decimal(summary["gate_entropy"], 3), even(size - excluded)],
        ["lead of the chosen, in probability", decimal(summary["margin"], 4), "0"],
        ["entropy of use, nats", decimal(summary["use_entropy"], 3), even(size)],
        ["effective controls", decimal(summary["effective"], 1), f"{size:g}"],
        ["dead controls", str(len(summary["dead"])), "0"],
    ]


def summary_view(routing: Routing) -> RenderableType:
    """Show the whole model's numbers and its first dead controls."""
    dead = routing["summary"]["dead"]
    and_more = f" and {len(dead) - 12} more" if len(dead) > 12 else ""
    note = f"never chosen: {', '.join(dead[:12])}{and_more}" if dead else ""
    return FittedTable("Routing", *summary_rows(routing), notes=[note])


def site_rows(routing: Routing) -> HeadedRows:
    """Return the numbers of every site, in their order."""
    names = [site["name"] for site in routing["sites"]]
    head = ["site", "top", "share %", "local %", "effective", "entropy", "lead"]
    return [*head, "one token %", "size %"], [
        [
            row["name"],
            row["top"],
            hundredths(shares[names.index(row["top"])]),
            hundredths(row["local_share"]),
            decimal(row["effective"], 1),
            decimal(row["gate_entropy"], 3),
            decimal(row["margin"], 4),
            hundredths(row["one_token"]),
            hundredths(row["relative_size"]),
        ]
        for row, shares in zip(routing["per_site"], routing["share"], strict=True)
    ]


def site_view(routing: Routing) -> RenderableType:
    """Show the sites whose update is largest beside their block's output, in their order."""
    head, rows = site_rows(routing)
    sizes = [row["relative_size"] for row in routing["per_site"]]
    largest = sorted(range(len(rows)), key=lambda index: -sizes[index])[:SHOWN]
    shown = [rows[index] for index in sorted(largest)]
    note = "share: of top; lead: in mean probability; size: update / block's output"
    notes = [note, _left_out(len(rows), "sites, those of the largest update")]
    return FittedTable("Sites", head, shown, notes=notes)


def control_rows(routing: Routing) -> HeadedRows:
    """Return the numbers of every control, the most chosen first."""
    names = [site["name"] for site in routing["sites"]]
    rows = []
    for control in sorted(routing["per_control"], key=lambda control: -control["use"]):
        column = [shares[names.index(control["name"])] for shares in routing["share"]]
        share = max(column)
        top_site = f"{names[column.index(share)]} ({percent(share)})" if share else MISSING
        rows.append(
            [control["name"], hundredths(control["use"]), f"{control['norm']:.3f}", top_site]
        )
    return ["control", "use %", "norm of B A", "most by site"], rows


def control_view(routing: Routing) -> RenderableType:
    """Show the controls that are chosen most; dead ones are red."""
    head, rows = control_rows(routing)
    dead = {control["name"] for control in routing["per_control"] if control["dead"]}
    shown = [[Text(cell, "red" if row[0] in dead else "") for cell in row] for row in rows[:SHOWN]]
    notes = ["use: share of all choices", _left_out(len(rows), "controls, the most chosen")]
    return FittedTable("Controls", head, shown, notes=notes)


def distance_view(routing: Routing) -> RenderableType:
    """Show how far apart the tasks' routes are: 0 the same, 1 nothing shared."""
    section = routing["task_distance"]
    rows = [
        [name, *(f"{value:.3f}" for value in row)]
        for name, row in zip(section["tasks"], section["matrix"], strict=True)
    ]
    note = "0: the same, 1: none shared; Jensen-Shannon, mean over the sites"
    head = ["task", *section["tasks"]]
    return FittedTable("Distance of the tasks' routes", head, rows, notes=[note])


def comparison_view(routing: Routing) -> RenderableType:
    """Show the sites that differ most from the other run's."""
    section = routing["compare"]
    names, distances = [site["name"] for site in routing["sites"]], section["distance"]
    rows = []
    for index in sorted(range(len(names)), key=lambda index: -distances[index])[:SHOWN]:
        row = section["difference"][index]
        high, low = max(row), min(row)
        increase = f"{names[row.index(high)]} {100 * high:+.1f}" if high > 0 else MISSING
        decrease = f"{names[row.index(low)]} {100 * low:+.1f}" if low < 0 else MISSING
        rows.append([names[index], f"{distances[index]:.3f}", increase, decrease])
    title = f"Against {printable(section['run'])}: distance {sum(distances) / len(names):.3f}"
    note = "distance: 0 the same, 1 none shared; more and less: in points of the site's choices"
    notes = [note, _left_out(len(names), "sites, the most different")]
    head = ["site", "distance", "more here", "less here"]
    return FittedTable(title, head, rows, notes=notes)


def ablation_view(routing: Routing) -> RenderableType:
    """Show the sites at which the loss changes most when their routes are made local."""
    entries = sorted(routing["ablation"], key=lambda entry: -abs(entry["loss_change"]))
    rows = []
    for entry in entries[:SHOWN]:
        change, error = entry["loss_change"], entry["stderr"]
        sure = error is not None and abs(change) > 2 * error
        sign = "beyond 2 stderr" if sure else ""
        rows.append([entry["site"], f"{change:+.5f}", decimal(error, 5), sign])
    notes = [_left_out(len(entries), "sites, the largest changes")]
    head = ["site", "change, nats", "± stderr", ""]
    return FittedTable("Loss with one site made local", head, rows, notes=notes)


def token_view(routing: Routing, width: int, site: str | None) -> RenderableType:
    """Show each token's own vote: at one site, or at as many sites as fit side by side."""
    section, names = routing["tokens"], [entry["name"] for entry in routing["sites"]]
    # Where each token has a choice of its own there is none to compare it with.
    shared = routing["level"] != "token"
    choices = section["choice"] if shared else [[] for _ in names]
    tokens = [
        printable(token).replace("\n", "\\n").replace(" ", "·") for token in section["tokens"]
    ]
    total, tokens = len(tokens), tokens[:TOKENS]
    notes = [_left_out(total, "tokens, the first", TOKENS)]
    if site is not None:
        index = names.index(site)
        title = f"Votes at {site}"
        if shared:
            chosen = ", ".join(names[control] for control in choices[index])
            title += f": chosen {chosen}, by a lead of {section['margin'][index]:.4f}"
        rows = []
        for number, token in enumerate(tokens):
            vote, probability = (section[key][index][number] for key in ("votes", "probability"))
            mark = "✓" if vote in choices[index] else ""
            rows.append([token, names[vote], f"{probability:.4f}", mark])
        head = ["token", "its vote", "probability", ""]
        return FittedTable(title, head, rows, notes=notes)
    fitting = max(1, min(len(names), (width - 20) // (max(map(len, names)) + 3)))
    votes: list[list[str | Text]] = []
    for number, token in enumerate(tokens):
        row: list[str | Text] = [token]
        for index in range(fitting):
            vote = section["votes"][index][number]
            row.append(Text(names[vote], "bold green" if vote in choices[index] else ""))
        votes.append(row)
    if shared:
        chosen_names = [", ".join(names[k] for k in choice) for choice in choices[:fitting]]
        votes.append([Text(cell, "bold") for cell in ("chosen", *chosen_names)])
    votes.append(["lead", *(f"{margin:.4f}" for margin in section["margin"][:fitting])])
    if fitting < len(names):
        notes.append(f"{fitting} of {len(names)} sites fit; --site {names[-1]} shows another")
    head = ["token", *names[:fitting]]
    return FittedTable("Each token's vote, by site", head, votes, notes=notes)


def _left_out(total: int, unit: str, shown: int = SHOWN) -> str:
    return f"{shown} of {total} {unit}; all are in routing.json" if total > shown else ""
