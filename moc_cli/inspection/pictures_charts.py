"""Charts around the maps: use over training, distances between tasks, comparison and ablation."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from moc_cli.inspection.captions import caption, subtitle
from moc_cli.inspection.maps import FEW, OWN, Sites, peak
from moc_cli.inspection.pictures_style import (
    BLOCK_COLOURS,
    BLOCK_WORDS,
    EDGE,
    FAINT,
    INK,
    SMALLEST,
    Sheet,
    colour_bar,
    differences,
    draw_map,
    fitted,
    mark_cells,
    name_ticks,
    shares,
)

ABLATED = (
    "Loss: over the tokens of the answer, or of the label, in nats. Above 0: the route helps. "
    "Whiskers: one standard error over the rows."
)
WRITTEN = 10  # up to so many tasks have their distances written into the cells


def history(routing: dict[str, Any]) -> Figure | None:
    """Draw each control's use and the local share over training; None where none was recorded."""
    entries = routing.get("history") or []
    if not entries:
        return None
    sites = Sites.of(routing)
    steps = [entry["step"] for entry in entries]
    use = np.array([entry["use"] for entry in entries], dtype=float).T
    sheet = Sheet(
        "How the use of the controls changed in training",
        subtitle(routing),
        caption(
            routing,
            f"Recorded at {len(steps)} steps. Dotted: the local share under chance.",
            "Grey: not chosen since the step before.",
            counted=False,
        ),
        height=4.6,
    )
    grid = sheet.figure.add_gridspec(2, 1, height_ratios=[1, 3])
    axes = sheet.figure.add_subplot(grid[1])
    line = sheet.figure.add_subplot(grid[0], sharex=axes)
    edges = step_edges(steps)
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(use) + 1) - 0.5,
        use,
        cmap=shares(),
        norm=Normalize(SMALLEST, peak(use)),
        rasterized=True,
        antialiased=False,
    )
    axes.set_ylim(len(use) - 0.5, -0.5)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("training step")
    axes.set_ylabel("control" if len(use) <= FEW else "control (layer)")
    sites.ticks(axes, "y")
    _local_line(line, steps, [entry["local_share"] for entry in entries], routing)
    colour_bar(sheet, mesh, [line, axes], "share of all choices in its pool", size=0.75)
    return sheet.figure


def step_edges(steps: list[int]) -> np.ndarray:
    """Return the len(steps) + 1 edges of the columns: half-way between neighbouring steps."""
    at = np.asarray(steps, dtype=float)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middles = (at[1:] + at[:-1]) / 2
    first, last = at[0] - (middles[0] - at[0]), at[-1] + (at[-1] - middles[-1])
    return np.concatenate([[first], middles, [last]])


def _local_line(axes: Axes, steps: list[int], values: list[float], routing: dict[str, Any]) -> None:
    marker = "o" if len(steps) <= 40 else ""
    axes.plot(steps, values, color=INK, lw=1.1, marker=marker, ms=2)
    axes.axhline(routing["summary"]["chance_local"], color=FAINT, lw=0.8, ls=":")
    axes.set_ylim(0, max(0.1, *values) * 1.1)
    axes.set_ylabel("local share")
    axes.tick_params("x", labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params("y", nbins=4)


def task_distance(routing: dict[str, Any]) -> Figure | None:
    """Draw how far the tasks' routes lie apart, task × task; None below two tasks."""
    found = routing.get("task_distance") or {}
    names, matrix = found.get("tasks") or [], np.asarray(found.get("matrix") or [], dtype=float)
    if len(names) < 2:
        return None
    sheet = Sheet(
        "How far the routes of two tasks lie apart",
        subtitle(routing),
        caption(routing, "0: the same routes; 1: none shared. Mean over the blocks."),
        height=min(4.4, 2.1 + 0.3 * len(names)),
    )
    axes = sheet.figure.add_subplot()
    mesh = draw_map(axes, matrix, highest=1.0)
    axes.set_aspect("equal")
    name_ticks(axes, names, along="x", room=1.1)
    name_ticks(axes, names, along="y", room=1.1)
    for row, column in np.ndindex(*matrix.shape) if len(names) <= WRITTEN else ():
        value = matrix[row, column]
        colour = "white" if value > 0.45 else INK
        place = {"ha": "center", "va": "center", "size": 6.5, "color": colour}
        axes.text(column, row, f"{value:.2f}", **place)  # type: ignore[arg-type]
    colour_bar(sheet, mesh, axes, "Jensen-Shannon distance")
    return sheet.figure


def comparison(routing: dict[str, Any]) -> Figure | None:
    """Draw this run's shares less the other's, and each block's distance; None without one."""
    other = routing.get("compare")
    if not other:
        return None
    sites = Sites.of(routing)
    values = sites.in_pool(other["difference"])
    sheet = Sheet(
        f"This run's choices less those of {fitted(_last(other['run']), 2.6, 9.5, 'bold')}",
        subtitle(routing),
        caption(routing, "Red: chosen more often here.", OWN.split(" Grey")[0]),
        height=5.2,
    )
    axes, bars = sheet.figure.subplots(1, 2, width_ratios=[6, 1])
    mesh = draw_map(axes, values, highest=peak(abs(values)), colours=differences())
    mark_cells(axes, [(index, index) for index in range(len(sites.names))])
    sites.ticks(axes, "x")
    sites.ticks(axes, "y")
    axes.set_xlabel("control" if len(sites.names) <= FEW else "control (layer)")
    axes.set_ylabel("block that chooses" + ("" if len(sites.names) <= FEW else " (layer)"))
    bars.barh(range(len(other["distance"])), other["distance"], height=0.8, color=FAINT)
    bars.set_ylim(*axes.get_ylim())
    bars.set_xlim(0, max(other["distance"], default=0) * 1.05 or 1)
    bars.tick_params("y", left=False, labelleft=False)
    bars.spines[["top", "right"]].set_visible(False)
    bars.locator_params("x", nbins=2)
    bars.set_xlabel("Jensen-Shannon\ndistance")
    colour_bar(sheet, mesh, [axes, bars], "difference of shares")
    return sheet.figure


def _last(path: str) -> str:
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2]


def ablation(routing: dict[str, Any]) -> Figure | None:
    """Draw how much the loss rises at each block when its route becomes the local control."""
    entries = routing.get("ablation")
    if not entries:
        return None
    blocks = dict(zip(Sites.of(routing).names, Sites.of(routing).blocks, strict=True))
    layers = dict(zip(Sites.of(routing).names, Sites.of(routing).layers, strict=True))
    names = [entry["site"] for entry in entries]
    sheet = Sheet(
        "Which routes matter: the loss with the local control in their place",
        subtitle(routing),
        caption(routing, ABLATED),
        height=2.9,
    )
    axes = sheet.figure.add_subplot()
    for block, colour in BLOCK_COLOURS.items():
        own = [at for at, name in enumerate(names) if blocks[name] == block]
        if own:
            change = [entries[at]["loss_change"] for at in own]
            error = [entries[at]["stderr"] or 0.0 for at in own]
            axes.bar(own, change, color=colour, width=0.75, label=f"{BLOCK_WORDS[block]} block")
            axes.errorbar(own, change, yerr=error, fmt="none", ecolor=INK, elinewidth=0.6)
    axes.axhline(0, color=EDGE, lw=0.6)
    axes.set_xlim(-0.8, len(names) - 0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("change of a row's loss")
    place = {"loc": "lower right", "bbox_to_anchor": (1, 1), "ncols": 2}
    axes.legend(frameon=False, fontsize=7, **place)  # type: ignore[arg-type]
    if len(names) <= FEW:
        name_ticks(axes, names, along="x")
    else:
        order = Sites(names, [layers[name] for name in names], [], [])
        order.ticks(axes, "x")
        axes.set_xlabel("block (layer)")
    return sheet.figure
