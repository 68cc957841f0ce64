"""What the figures are made of: sites, colours, maps and bars with their values, ticks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.ticker import FuncFormatter

from moc_cli.inspection.captions import caption, subtitle
from moc_cli.report.figure_style import (
    COLOURS,
    EDGE,
    FAINT,
    INK,
    SMALL,
    FigureFrame,
    Tooltip,
    fitted,
)

NEVER = "#eceef2"  # a control that was never chosen
OUTSIDE = (1.0, 1.0, 1.0, 0.0)  # a control outside the block's pool
PALE = "#e2edbf"  # blended into the smallest shares
SMALLEST = 1e-12  # below this a share counts as never
FEW = 24  # up to this many blocks are named at the axes
BLOCK_COLOURS = {"attn": COLOURS[0], "ffn": COLOURS[1]}
BLOCK_WORDS = {"attn": "attention", "ffn": "FFN"}

Axis = Literal["x", "y"]


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
        members = [index for index, site_block in enumerate(self.blocks) if site_block == block]
        return sorted(members, key=lambda index: self.layers[index])

    def in_pool(self, values: Any) -> np.ndarray:
        """Return [site, control] as float64, NaN where the gate cannot choose the control."""
        matrix = np.asarray(values, dtype=float)
        pools = np.asarray(self.pools)
        return np.where(pools[:, None] == pools[None, :], matrix, np.nan)

    def label(self, axes: Axes, along: Axis, label: str, *, unit: str = "layer") -> None:
        """Label an axis, and name its blocks; where they are many, number their layers."""
        if len(self.names) <= FEW:
            name_ticks(axes, self.names, along=along)
        else:
            layer_ticks(axes, self.layers, along=along)
            label = f"{label} ({unit})"
        (axes.set_xlabel if along == "x" else axes.set_ylabel)(label)


def control_by_layer(sites: Sites, routing: dict[str, Any], block: str) -> np.ndarray:
    """Return [layer, control of this block type]: the mean share over the layer's sites.

    Sites whose pool lacks the control are left out of the mean; NaN where none remains.
    """
    values = sites.in_pool(routing["share"])[:, sites.members(block)]
    means = []
    for layer in sorted(set(sites.layers)):
        shares = values[np.asarray(sites.layers) == layer]
        count = (~np.isnan(shares)).sum(axis=0)
        total = np.nansum(shares, axis=0)
        means.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    return np.array(means)


def step_edges(steps: list[int]) -> np.ndarray:
    """Return the len(steps) + 1 edges of the columns: half-way between neighbouring steps."""
    at = np.asarray(steps, dtype=float)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middles = (at[1:] + at[:-1]) / 2
    first, last = at[0] - (middles[0] - at[0]), at[-1] + (at[-1] - middles[-1])
    return np.concatenate([[first], middles, [last]])


def share_colours() -> Colormap:
    """Light grey for never, then viridis from light to dark; blank outside the pool.

    The light end is paler than viridis has it, so that small shares do not dominate the map.
    """
    steps = matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1.0, 256))[:, :3]
    paler = np.clip(np.linspace(0.75, -1.0, 256), 0, 1)[:, None]
    steps = paler * np.array(to_rgb(PALE)) + (1 - paler) * steps
    colours = LinearSegmentedColormap.from_list("share", steps, N=512)
    return colours.with_extremes(under=NEVER, bad=OUTSIDE)


def difference_colours() -> Colormap:
    """Blue for less, red for more, light grey for the same; blank outside the pool."""
    ends = ["#08306b", "#2171b5", "#9ecae1", "#f1f1f1", "#f4a582", "#c8402f", "#67001f"]
    return LinearSegmentedColormap.from_list("difference", ends, N=511).with_extremes(bad=OUTSIDE)


def share_text(share: float) -> str:
    """Return a share in percent, or that it is none."""
    return f"{100 * share:.1f} %" if share > SMALLEST else "never"


def in_percents() -> FuncFormatter:
    """Return the format of an axis of shares."""
    return FuncFormatter(lambda share, _: f"{100 * share:.3g}")


def in_points(change: float) -> str:
    """Return a difference of shares in points; empty where there is none."""
    return f"{100 * change:+.0f}" if abs(change) > SMALLEST else ""


def in_percent(share: float) -> str:
    """Return a share as a whole number of percent; empty where it is none."""
    return f"{100 * share:.0f}" if share > SMALLEST else ""


def new_frame(
    routing: dict[str, Any], title: str, *notes: str, height: float, counted: bool = True
) -> FigureFrame:
    """Return a figure that says which run it shows; `counted`: and how many decisions."""
    return FigureFrame(title, subtitle(routing), caption(routing, *notes, counted=counted), height)


def draw_sites(
    frame: FigureFrame,
    axes: Axes,
    sites: Sites,
    values: np.ndarray,
    *,
    rows: Sequence[int] | None = None,
    columns: Sequence[int] | None = None,
    task: str = "",
    **style: Any,
) -> QuadMesh:
    """Draw a map of [site, control], or of some of them; a site's own control is outlined."""
    rows = range(len(values)) if rows is None else rows
    columns = range(len(values)) if columns is None else columns
    own_cells = [
        (i, j) for i, row in enumerate(rows) for j, column in enumerate(columns) if row == column
    ]
    choosing = [f"{task}{sites.names[row]} chooses" for row in rows]
    controls = [sites.names[column] for column in columns]
    part = values[np.ix_(rows, columns)]
    return draw_map(frame, axes, part, choosing, controls, outlined=own_cells, **style)


def draw_map(
    frame: FigureFrame,
    axes: Axes,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    highest: float,
    text: Callable[[int, int], str] | None = None,
    colours: Colormap | None = None,
    outlined: Sequence[tuple[int, int]] = (),
    numbered: int = 7,
    number: Callable[[float], str] = in_percent,
) -> QuadMesh:
    """Draw a matrix, row 0 on top; NaN cells stay blank. Cells meet the pixels' edges.

    `rows` and `columns` name a cell in its tooltip, `text(row, column)` its value if that is not a
    share. `highest` is the value of the darkest colour; with `colours`, those of a difference, the
    scale runs from -highest to it. `outlined` holds the (row, column) of cells with a thin frame.
    The cells of at most `numbered` rows and columns have their `number` written into them.
    """
    mesh = draw_cells(
        axes, values, np.arange(len(columns) + 1) - 0.5, highest=highest, colours=colours
    )
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    squares = [corners + (column, row) for row, column in outlined]
    frames = PolyCollection(squares, facecolors="none", edgecolors=EDGE, linewidths=0.45)
    axes.add_collection(frames, autolim=False)
    drawn = np.argwhere(~np.isnan(values))
    if max(values.shape) <= numbered:
        write_numbers(axes, values, highest, number)
    if text is None:  # one tooltip for all grey cells: far smaller pages where they are many
        everything = (-0.5, -0.5, len(columns) - 0.5, len(rows) - 0.5)
        frame.tooltips.append(Tooltip(axes, everything, "Grey:", "never chosen", False))
        drawn = np.argwhere(values > SMALLEST)
    for row, column in drawn.tolist():
        value = float(values[row, column])
        described = f"{columns[column]}: {text(row, column) if text else share_text(value)}"
        box = (column - 0.5, row - 0.5, column + 0.5, row + 0.5)
        listed = abs(value) > SMALLEST
        frame.tooltips.append(Tooltip(axes, box, rows[row], described, listed))
    return mesh


def write_numbers(
    axes: Axes, values: np.ndarray, highest: float, number: Callable[[float], str]
) -> None:
    """Write a number into each cell, light on dark colours; none where it would be empty."""
    for (row, column), value in np.ndenumerate(values):
        shown = "" if np.isnan(value) else number(float(value))
        if shown:
            text = axes.text(column, row, shown, ha="center", va="center", size=SMALL)
            text.set_color("white" if abs(value) > 0.45 * highest else INK)


def draw_cells(
    axes: Axes,
    values: np.ndarray,
    edges: np.ndarray,
    *,
    highest: float,
    colours: Colormap | None = None,
) -> QuadMesh:
    """Draw the cells of a matrix alone; `edges` are those of its columns."""
    mesh = axes.pcolormesh(
        edges,
        np.arange(len(values) + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=colours or share_colours(),
        norm=Normalize(-highest if colours else SMALLEST, highest),
        rasterized=True,  # thousands of cells as one image: small files and no hairlines
        antialiased=False,
    )
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(len(values) - 0.5, -0.5)
    return mesh


def draw_bars(
    frame: FigureFrame,
    axes: Axes,
    values: Sequence[float],
    names: Sequence[str],
    *,
    row: str,
    along: Axis,
    end: float,
    colours: Sequence[str] | str = FAINT,
    text: Callable[[float], str] = share_text,
) -> None:
    """Draw a bar for each value beside or above a map, from 0 to `end`."""
    (axes.bar if along == "x" else axes.barh)(range(len(values)), values, 0.8, color=colours)
    if text is share_text:
        (axes.yaxis if along == "x" else axes.xaxis).set_major_formatter(in_percents())
    axes.spines[["top", "right"]].set_visible(False)
    for place, (name, value) in enumerate(zip(names, values, strict=True)):
        low, high = place - 0.5, place + 0.5
        box = (low, end, high, 0.0) if along == "x" else (0.0, low, end, high)
        frame.tooltips.append(Tooltip(axes, box, row, f"{name}: {text(value)}", value > SMALLEST))
    if along == "x":
        axes.set_ylim(0, end)
        axes.tick_params("x", bottom=False, labelbottom=False)
    else:
        axes.set_xlim(0, end)
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.tick_params("y", left=False, labelleft=False)
        axes.locator_params("x", nbins=2)


def colour_bar(
    frame: FigureFrame,
    mesh: QuadMesh,
    axes: Any,
    label: str,
    *,
    size: float = 0.8,
    percent: bool = True,
) -> None:
    """Add the scale of the colours with its unit; the grey of "never" stands in the caption."""
    form = in_percents() if percent else None
    bar = frame.figure.colorbar(mesh, ax=axes, shrink=size, aspect=28, pad=0.015, format=form)
    bar.set_label(label)
    bar.outline.set_linewidth(0.5)


def layer_ticks(axes: Axes, layers: Sequence[int], *, along: Axis, max_numbers: int = 16) -> None:
    """Number every layer, or every 2nd, 4th, 5th … so that at most `max_numbers` numbers stand.

    `layers` holds the layer of each row or column; a number stands amid its layer's cells.
    """
    distinct = list(dict.fromkeys(layers))
    step = next(
        step for step in (1, 2, 4, 5, 8, 10, 20, 50, 1000) if len(distinct) <= max_numbers * step
    )
    places: dict[int, list[int]] = {layer: [] for layer in distinct}
    for place, layer in enumerate(layers):
        places[layer].append(place)
    shown = distinct[::step]
    middles = [sum(places[layer]) / len(places[layer]) for layer in shown]
    (axes.set_xticks if along == "x" else axes.set_yticks)(middles, [str(layer) for layer in shown])


def name_ticks(axes: Axes, names: Sequence[str], *, along: Axis, room: float = 0.9) -> None:
    """Name every row or column, each within `room` inches."""
    shown = [fitted(name, room, SMALL) for name in names]
    (axes.set_xticks if along == "x" else axes.set_yticks)(range(len(names)), shown)
    axes.tick_params(along, labelsize=SMALL, labelrotation=90 if along == "x" else 0)


def peak(values: np.ndarray) -> float:
    """Return the highest value for the darkest colour: 1 where nothing was counted."""
    counted = values[~np.isnan(values)]
    return float(counted.max()) if counted.size and counted.max() > 0 else 1.0
