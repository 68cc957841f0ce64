"""The maps of who chooses whom: block × control, by type, by layer and by task.

The panels by type are those of the paper's Figures 4-6, the maps by layer those of Figures 7-12
(arXiv 2606.31397), with shares over many decisions where the paper shows one choice.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moc_cli.inspection.captions import caption, subtitle
from moc_cli.inspection.pictures_style import (
    BLOCK_COLOURS,
    BLOCK_WORDS,
    FAINT,
    Sheet,
    colour_bar,
    draw_map,
    fitted,
    layer_ticks,
    mark_cells,
    name_ticks,
)

SHARE = "share of a block's choices"
OWN = "Outlined: a block's own control. Grey: never chosen."
FEW = 24  # up to so many blocks have their names at the axes


@dataclass(frozen=True)
class Sites:
    """The sites of a routing.json as columns."""

    names: list[str]
    layers: list[int]
    blocks: list[str]
    pools: list[str]

    @classmethod
    def of(cls, routing: dict[str, Any]) -> "Sites":
        keys = ("name", "layer", "block", "pool")
        return cls(*([site[key] for site in routing["sites"]] for key in keys))

    def members(self, block: str) -> list[int]:
        """Return the indices of a block type's sites, by layer."""
        found = [index for index, own in enumerate(self.blocks) if own == block]
        return sorted(found, key=lambda index: self.layers[index])

    def in_pool(self, values: Any) -> np.ndarray:
        """Return [site, control] as float64, NaN where the gate cannot choose the control."""
        matrix = np.asarray(values, dtype=float)
        pools = np.asarray(self.pools)
        return np.where(pools[:, None] == pools[None, :], matrix, np.nan)

    def ticks(self, axes: Axes, along: str, *, names: bool = True) -> None:
        """Number the layers, or name the blocks where they are few."""
        if names and len(self.names) <= FEW:
            name_ticks(axes, self.names, along=along)
        else:
            layer_ticks(axes, self.layers, along=along)


def site_map(routing: dict[str, Any]) -> Figure:
    """Draw the share of every control in every block's choices; above it, each control's use."""
    sites = Sites.of(routing)
    values = sites.in_pool(routing["share"])
    sheet = Sheet(
        "Which control each block chooses",
        subtitle(routing),
        caption(routing, OWN, "Bars: a control's share of all choices in its pool."),
        height=5.7,
    )
    grid = sheet.figure.add_gridspec(2, 1, height_ratios=[1, 9], hspace=0.02)
    axes = sheet.figure.add_subplot(grid[1])
    bars = sheet.figure.add_subplot(grid[0], sharex=axes)
    mesh = draw_map(axes, values, highest=peak(values))
    mark_cells(axes, [(index, index) for index in range(len(sites.names))])
    sites.ticks(axes, "x")
    sites.ticks(axes, "y")
    few = len(sites.names) <= FEW
    axes.set_xlabel("control" if few else "control (layer; attention before FFN)")
    axes.set_ylabel("block that chooses" if few else "block that chooses (layer)")
    _use_bars(bars, routing, sites)
    colour_bar(sheet, mesh, [bars, axes], SHARE, size=0.75)
    return sheet.figure


def _use_bars(axes: Axes, routing: dict[str, Any], sites: Sites) -> None:
    use = [entry["use"] for entry in routing["per_control"]]
    colours = [BLOCK_COLOURS.get(block, FAINT) for block in sites.blocks]
    axes.bar(range(len(use)), use, width=0.8, color=colours)
    axes.set_ylabel("use")
    axes.set_ylim(0, max(use, default=0) * 1.08 or 1)
    axes.tick_params("x", bottom=False, labelbottom=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params("y", nbins=3)
    for place, (block, colour) in enumerate(BLOCK_COLOURS.items()):
        if block in sites.blocks:
            at = (0.99 - 0.09 * (1 - place), 1.02)
            style = {"transform": axes.transAxes, "ha": "right", "size": 6.5, "color": colour}
            axes.text(*at, BLOCK_WORDS[block], **style)  # type: ignore[arg-type]


def cross_types(routing: dict[str, Any]) -> Figure | None:
    """Draw attention and FFN blocks' choices among attention and FFN controls, layer × layer."""
    sites = Sites.of(routing)
    types = [block for block in BLOCK_WORDS if block in sites.blocks]
    if not types:
        return None
    values = sites.in_pool(routing["share"])
    sheet = Sheet(
        "Choices between attention and FFN",
        subtitle(routing),
        caption(routing, "In brackets: the panel's part of those blocks' choices.", OWN),
        height=2.85 * len(types),
    )
    grid = sheet.figure.subplots(len(types), len(types), squeeze=False)
    highest = peak(values)
    for row, block in zip(grid, types, strict=True):
        for axes, control in zip(row, types, strict=True):
            mesh = _cross_panel(axes, sites, values, block, control, highest)
    colour_bar(sheet, mesh, grid, SHARE, size=0.7)
    return sheet.figure


def _cross_panel(
    axes: Axes, sites: Sites, values: np.ndarray, block: str, control: str, highest: float
) -> Any:
    rows, columns = sites.members(block), sites.members(control)
    part = values[np.ix_(rows, columns)]
    mesh = draw_map(axes, part, highest=highest)
    layer_ticks(axes, [sites.layers[index] for index in rows], along="y")
    layer_ticks(axes, [sites.layers[index] for index in columns], along="x")
    if block == control:
        mark_cells(axes, [(index, index) for index in range(len(rows))])
    share = float(np.nansum(part)) / len(rows)
    told = "not in their pool" if np.isnan(part).all() else f"{share:.0%}"
    title = f"{BLOCK_WORDS[block]} blocks → {BLOCK_WORDS[control]} controls ({told})"
    axes.set_title(fitted(title, 2.6, 7.5), size=7.5)
    axes.set_ylabel(f"layer of {BLOCK_WORDS[block]} block")
    axes.set_xlabel(f"layer of {BLOCK_WORDS[control]} control")
    return mesh


def layer_maps(routing: dict[str, Any]) -> Figure | None:
    """Draw, for attention and for FFN controls, in which layers the blocks choose each."""
    sites = Sites.of(routing)
    types = [block for block in BLOCK_WORDS if block in sites.blocks]
    if not types:
        return None
    layers = sorted(set(sites.layers))
    parts = {block: control_by_layer(sites, routing, block) for block in types}
    sheet = Sheet(
        "In which layers each control is chosen",
        subtitle(routing),
        caption(
            routing,
            "A cell: the mean over a layer's blocks. Bars: a control's share of all choices in its "
            "pool; ×: never chosen. Outlined: the control's own layer.",
        ),
        height=3.7,
    )
    widths = [4, 1] * len(types)
    row = sheet.figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    highest = max(peak(part) for part in parts.values())
    for place, (block, part) in enumerate(parts.items()):
        axes, bars = row[2 * place], row[2 * place + 1]
        own = [sites.layers[index] for index in sites.members(block)]
        mesh = draw_map(axes, part, highest=highest)
        mark_cells(axes, [(index, layers.index(layer)) for index, layer in enumerate(own)])
        layer_ticks(axes, layers, along="x", most=8)
        layer_ticks(axes, own, along="y")
        axes.set_title(f"{BLOCK_WORDS[block]} controls", size=8)
        axes.set_xlabel("layer that chooses")
        axes.set_ylabel(f"{BLOCK_WORDS[block]} control (layer)")
        _side_bars(bars, routing, sites, block)
    colour_bar(sheet, mesh, list(row), "mean " + SHARE, size=0.8)
    return sheet.figure


def control_by_layer(sites: Sites, routing: dict[str, Any], block: str) -> np.ndarray:
    """Return [control of this block type, layer]: the mean share over the layer's sites.

    Sites whose pool lacks the control are left out of the mean; NaN where none remains.
    """
    values = sites.in_pool(routing["share"])[:, sites.members(block)]
    rows = []
    for layer in sorted(set(sites.layers)):
        there = values[[index for index, own in enumerate(sites.layers) if own == layer]]
        known = (~np.isnan(there)).sum(axis=0)
        total = np.nansum(there, axis=0)
        rows.append(np.where(known > 0, total / np.maximum(known, 1), np.nan))
    return np.array(rows).T


def _side_bars(axes: Axes, routing: dict[str, Any], sites: Sites, block: str) -> None:
    members = sites.members(block)
    every = [entry["use"] for entry in routing["per_control"]]
    use = [every[index] for index in members]
    axes.barh(range(len(use)), use, height=0.8, color=BLOCK_COLOURS[block])
    dead = [at for at, index in enumerate(members) if routing["per_control"][index]["dead"]]
    room = max(every, default=0) * 1.1 or 1
    axes.plot([room * 0.06] * len(dead), dead, "x", color=FAINT, ms=2.2, mew=0.5)
    axes.set_xlim(0, room)
    axes.set_ylim(len(use) - 0.5, -0.5)
    axes.tick_params("y", left=False, labelleft=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.locator_params("x", nbins=2)
    axes.set_xlabel("use")


def tasks(routing: dict[str, Any]) -> Figure | None:
    """Draw the map of every task beside the others, all on one scale; None for a single task."""
    found = routing.get("tasks") or {}
    if len(found) < 2:
        return None
    sites = Sites.of(routing)
    maps = {name: sites.in_pool(entry["share"]) for name, entry in found.items()}
    rows = math.ceil(len(maps) / 2)
    sheet = Sheet(
        "Which control each block chooses, by task",
        subtitle(routing),
        caption(routing, OWN, "All panels on one scale."),
        height=2.75 * rows,
    )
    grid = sheet.figure.subplots(rows, 2, squeeze=False)
    highest = max(peak(values) for values in maps.values())
    for axes in grid.flat[len(maps) :]:
        axes.set_axis_off()
    for place, (axes, (name, values)) in enumerate(zip(grid.flat, maps.items(), strict=False)):
        mesh = draw_map(axes, values, highest=highest)
        mark_cells(axes, [(index, index) for index in range(len(sites.names))])
        sites.ticks(axes, "x", names=False)
        sites.ticks(axes, "y", names=False)
        count = f" ({found[name]['decisions']:,})"
        axes.set_title(fitted(name, 1.7, 8) + count, size=8)
        axes.set_ylabel("block (layer)" if place % 2 == 0 else "")
        axes.set_xlabel("control (layer)" if place >= len(maps) - 2 else "")
    colour_bar(sheet, mesh, grid, SHARE, size=0.6 if rows > 2 else 0.9)
    return sheet.figure


def peak(values: np.ndarray) -> float:
    """Return the highest value for the colours' end: 1 where nothing was counted."""
    known = values[~np.isnan(values)]
    return float(known.max()) if known.size and known.max() > 0 else 1.0
