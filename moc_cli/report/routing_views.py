"""What `moc inspect-routing` shows in a terminal: the map of sites and controls, and tables.

Everything is drawn from the dict of routing.json.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from moc_cli.report.routing_tables import (
    ablation_table,
    comparison_table,
    control_table,
    distance_table,
    site_table,
    summary_table,
    token_tables,
)

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
WIDEST = 4  # characters of one control


def views(
    routing: Mapping[str, Any], *, width: int = 100, colored: bool = True, site: str | None = None
) -> list[RenderableType]:
    """Return all that there is to show of a routing, at most `width` columns wide."""
    shown: list[RenderableType] = []
    if routing["tokens"] is not None:
        shown += token_tables(routing, width=width, site=site)
    else:
        shown.append(heat_map(routing, width=width, colored=colored))
    shown += [summary_table(routing), site_table(routing), control_table(routing)]
    if routing["task_distance"]["matrix"]:
        shown.append(distance_table(routing))
    if routing["compare"] is not None:
        shown.append(comparison_table(routing))
    if routing["ablation"] is not None:
        shown.append(ablation_table(routing))
    return shown


def heat_map(
    routing: Mapping[str, Any], *, width: int = 100, colored: bool = True
) -> RenderableType:
    """Draw each site's shares: a row for a site (two in one line with colours), left to right
    the controls. Where the controls are more than the columns, neighbours are summed.
    """
    names = [site["name"] for site in routing["sites"]]
    label = max(len(_label(names, row, colored)) for row in range(len(names))) + 1
    room = max(8, min(width, 100) - label - 1)
    joined = -(-len(names) // room)
    cell = max(1, min(WIDEST, room // -(-len(names) // joined)))
    table = [_joined(row, joined) for row in routing["share"]]
    lines: list[RenderableType] = [_title(routing, joined)]
    lines += _axis(routing["sites"], joined, cell, label)
    step = 2 if colored else 1
    for row in range(0, len(names), step):
        text = Text(_label(names, row, colored).ljust(label), no_wrap=True)
        below = table[row + 1] if colored and row + 1 < len(names) else None
        for column, share in enumerate(table[row]):
            if not colored:
                text.append(RAMP[_level(share)] * cell)
            else:
                under = _color(below[column]) if below is not None else "default"
                text.append("▀" * cell, f"{_color(share)} on {under}")
        lines.append(text)
    return Group(*lines, _legend(colored))


def _label(names: Sequence[str], row: int, colored: bool) -> str:
    """Name a line's site, or its two sites: "3.attn ffn" where they are of one layer."""
    if not colored or row + 1 >= len(names):
        return names[row]
    layer, _, block = names[row + 1].partition(".")
    same = names[row].startswith(f"{layer}.")
    return f"{names[row]} {block if same else names[row + 1]}"


def _joined(row: Sequence[float], joined: int) -> list[float]:
    return [sum(row[first : first + joined]) for first in range(0, len(row), joined)]


def _title(routing: Mapping[str, Any], joined: int) -> Text:
    text = Text("Which control each site chooses", "bold")
    text.append(f"  {routing['decisions']:,} decisions a site", "not bold")
    about = "rows: sites; columns: controls, numbered by layer"
    text.append(f"\n{about}" + (f", {joined} a column" if joined > 1 else ""), "not bold dim")
    return text


def _axis(sites: Sequence[Mapping[str, Any]], joined: int, cell: int, label: int) -> list[Text]:
    """Draw the layers' numbers over the columns, as many as fit side by side."""
    columns = -(-len(sites) // joined)
    line = [" "] * (label + columns * cell + 4)
    free = 0
    for index in range(0, len(sites), joined):
        new = index == 0 or sites[index]["layer"] != sites[index - joined]["layer"]
        place = label + index // joined * cell
        if new and place >= free:
            for offset, char in enumerate(str(sites[index]["layer"])):
                line[place + offset] = char
            free = place + len(str(sites[index]["layer"])) + 1
    return [Text("".join(line).rstrip(), "dim", no_wrap=True)]


def _legend(colored: bool) -> Text:
    text = Text("share of choices: 0 ", "dim")
    for level in range(1, len(RAMP)):
        if colored:
            text.append("██", "rgb({},{},{}) not dim".format(*SCALE[level]))
        else:
            text.append(RAMP[level], "not dim")
    return text.append(" 100 %; the diagonal: a site's own control")


def _level(share: float) -> int:
    """The step of the scale; any share above 0 is seen."""
    if share <= 0:
        return 0
    return max(1, round((len(RAMP) - 1) * math.sqrt(min(share, 1.0))))


def _color(share: float) -> str:
    return "rgb({},{},{})".format(*SCALE[_level(share)])
