"""The figures of `moc inspect-routing`, each drawn from the dict of routing.json.

The panels by type are those of the paper's Figures 4-6, the maps by layer those of Figures 7-12
(arXiv 2606.31397), with shares over many decisions where the paper shows one choice. A figure is
None where routing.json has no data for it.
"""

import math
from typing import Any

import numpy as np

from moc_cli.inspection.captions import run_name
from moc_cli.inspection.figure_parts import (
    BLOCK_COLOURS,
    BLOCK_WORDS,
    Sites,
    colour_bar,
    control_by_layer,
    difference_colours,
    draw_bars,
    draw_cells,
    draw_map,
    draw_sites,
    in_percents,
    in_points,
    layer_ticks,
    name_ticks,
    new_frame,
    peak,
    share_text,
    step_edges,
)
from moc_cli.report.figure_style import (
    EDGE,
    FAINT,
    INK,
    SMALL,
    FigureFrame,
    Tooltip,
    figure_style,
    fitted,
)

SHARE = "share of a site's choices, %"
OWN = "Outlined: a site's own control."
GREY = "Grey: never chosen."
NUMBERED = 10  # up to this many tasks have their distances written into the cells
COLUMNS = 100  # where a training has more log lines than this, some of them share a tooltip


def site_map(routing: dict[str, Any]) -> FigureFrame:
    """Draw the share of every control in every site's choices; above it, each control's use."""
    sites = Sites.of(routing)
    values = sites.in_pool(routing["share"])
    bars_note = "Bars: a control's share of all choices in its pool."
    frame = new_frame(routing, "Which control each site chooses", OWN, GREY, bars_note, height=5.7)
    grid = frame.figure.add_gridspec(2, 1, height_ratios=[1, 9], hspace=0.02)
    bars, axes = grid.subplots(sharex=True)  # type: ignore[misc]

    def text(row: int, column: int) -> str:
        times, weight, probability = (
            routing[key][row][column] for key in ("counts", "weight", "probability")
        )
        means = f"mean weight {weight:.3g}, mean probability {probability:.3g}"
        return f"{share_text(values[row, column])}, {times} times, {means}"

    mesh = draw_sites(frame, axes, sites, values, highest=peak(values), text=text, numbered=14)
    sites.label(axes, "x", "control", unit="layer; attention before FFN")
    sites.label(axes, "y", "site that chooses")
    use = [control["use"] for control in routing["per_control"]]
    colours = [BLOCK_COLOURS.get(block, FAINT) for block in sites.blocks]
    end = max(use, default=0) * 1.08 or 1
    draw_bars(frame, bars, use, sites.names, row="use", along="x", end=end, colours=colours)
    bars.set_ylabel("use, %")
    bars.locator_params("y", nbins=3)
    for place, (block, colour) in zip((0.90, 0.99), BLOCK_COLOURS.items(), strict=True):
        if block in sites.blocks:
            label = {"s": BLOCK_WORDS[block], "size": SMALL, "color": colour, "ha": "right"}
            bars.text(place, 1.02, transform=bars.transAxes, **label)
    colour_bar(frame, mesh, [bars, axes], SHARE, size=0.75)
    return frame


def cross_types(routing: dict[str, Any]) -> FigureFrame | None:
    """Draw attention and FFN sites' choices among attention and FFN controls, layer × layer."""
    sites = Sites.of(routing)
    types = [block for block in BLOCK_WORDS if block in sites.blocks]
    if not types:
        return None
    values = sites.in_pool(routing["share"])
    brackets = "In brackets: the panel's share of those sites' choices."
    title, height = "Choices between attention and FFN", 2.85 * len(types)
    frame = new_frame(routing, title, brackets, OWN, GREY, height=height)
    grid = frame.figure.subplots(len(types), len(types), squeeze=False)
    for (i, j), axes in np.ndenumerate(grid):
        block, control = BLOCK_WORDS[types[i]], BLOCK_WORDS[types[j]]
        rows, columns = sites.members(types[i]), sites.members(types[j])
        mesh = draw_sites(
            frame, axes, sites, values, rows=rows, columns=columns, highest=peak(values)
        )
        part = values[np.ix_(rows, columns)]
        share = f"{np.nansum(part) / len(rows):.0%}"
        if np.isnan(part).all():
            share = "not in their pool"
        axes.set_title(fitted(f"{block} sites → {control} controls ({share})", 2.6, 7.5), size=7.5)
        layer_ticks(axes, [sites.layers[index] for index in rows], along="y")
        layer_ticks(axes, [sites.layers[index] for index in columns], along="x")
        axes.set_ylabel(f"layer of {block} site")
        axes.set_xlabel(f"layer of {control} control")
    colour_bar(frame, mesh, grid, SHARE, size=0.7)
    return frame


def layer_maps(routing: dict[str, Any]) -> FigureFrame | None:
    """Draw, for attention and for FFN controls, in which layers the sites choose each."""
    sites = Sites.of(routing)
    types = [block for block in BLOCK_WORDS if block in sites.blocks]
    if not types:
        return None
    note = (
        "A cell: the mean over a layer's sites. Bars: a control's share of all choices in its "
        "pool; ×: never chosen. Outlined: the control's own layer."
    )
    frame = new_frame(routing, "In which layers each control is chosen", note, height=4.0)
    grid = frame.figure.subplots(2, len(types), height_ratios=[1, 6], squeeze=False, sharex="col")
    layers = sorted(set(sites.layers))
    parts = {block: control_by_layer(sites, routing, block) for block in types}
    highest = max(peak(part) for part in parts.values())
    controls = routing["per_control"]
    end = max((control["use"] for control in controls), default=0) * 1.1 or 1
    for (block, part), bars, axes in zip(parts.items(), *grid, strict=True):
        members = sites.members(block)
        names = [sites.names[index] for index in members]
        mesh = draw_map(
            frame,
            axes,
            part,
            [f"layer {layer} chooses" for layer in layers],
            names,
            highest=highest,
            outlined=[(layers.index(sites.layers[index]), j) for j, index in enumerate(members)],
        )
        layer_ticks(axes, layers, along="y")
        layer_ticks(axes, [sites.layers[index] for index in members], along="x")
        axes.set_ylabel("layer that chooses")
        axes.set_xlabel(f"{BLOCK_WORDS[block]} control (layer)")
        use, colour = [controls[index]["use"] for index in members], BLOCK_COLOURS[block]
        draw_bars(frame, bars, use, names, row="use", along="x", end=end, colours=colour)
        bars.set_title(f"{BLOCK_WORDS[block]} controls", size=8)
        bars.set_ylabel("use, %")
        bars.locator_params("y", nbins=3)
        dead = [place for place, index in enumerate(members) if controls[index]["dead"]]
        bars.plot(dead, [end * 0.06] * len(dead), "x", color=FAINT, ms=2.2, mew=0.5)
    colour_bar(frame, mesh, grid, "mean " + SHARE, size=0.8)
    return frame


def task_maps(routing: dict[str, Any]) -> FigureFrame | None:
    """Draw the map of every task beside the others, all on one scale; None for a single task."""
    tasks = routing.get("tasks") or {}
    if len(tasks) < 2:
        return None
    sites = Sites.of(routing)
    maps = {name: sites.in_pool(task["share"]) for name, task in tasks.items()}
    rows = math.ceil(len(maps) / 2)
    title, scale = "Which control each site chooses, by task", "All panels on one scale."
    frame = new_frame(routing, title, OWN, GREY, scale, height=2.75 * rows)
    grid = frame.figure.subplots(rows, 2, squeeze=False)
    highest = max(peak(values) for values in maps.values())
    for place, (axes, (name, values)) in enumerate(zip(grid.flat, maps.items(), strict=False)):
        mesh = draw_sites(frame, axes, sites, values, task=f"{name}: ", highest=highest)
        layer_ticks(axes, sites.layers, along="x")
        layer_ticks(axes, sites.layers, along="y")
        axes.set_title(f"{fitted(name, 1.7, 8)} ({tasks[name]['decisions']:,})", size=8)
        axes.set_ylabel("site (layer)" if place % 2 == 0 else "")
        axes.set_xlabel("control (layer)" if place >= len(maps) - 2 else "")
    for axes in grid.flat[len(maps) :]:
        axes.set_axis_off()
    colour_bar(frame, mesh, grid, SHARE, size=0.6 if rows > 2 else 0.9)
    return frame


def history(routing: dict[str, Any]) -> FigureFrame | None:
    """Draw each control's use and the local share over training."""
    entries = routing.get("history") or []
    if not entries:
        return None
    sites = Sites.of(routing)
    steps = [entry["step"] for entry in entries]
    local = np.array([entry["local_share"] for entry in entries], dtype=float)
    use = np.array([entry["use"] for entry in entries], dtype=float).T
    note = (
        f"Recorded at {len(steps)} steps. Dotted: the local share under chance. "
        "Grey: not chosen since the step before."
    )
    frame = new_frame(routing, "Use of the controls in training", note, height=4.6, counted=False)
    line, axes = frame.figure.subplots(2, 1, sharex=True, height_ratios=[1, 3])
    edges = step_edges(steps)
    mesh = draw_cells(axes, use, edges, highest=peak(use))
    sites.label(axes, "y", "control")
    axes.set_xlabel("training step")
    line.plot(steps, local, color=INK, lw=1.1, marker="o" if len(steps) <= 40 else "", ms=2)
    line.axhline(routing["summary"]["chance_local"], color=FAINT, lw=0.8, ls=":")
    top = max(0.1, *local) * 1.1
    line.set_ylim(0, top)
    line.set_ylabel("local share, %")
    line.yaxis.set_major_formatter(in_percents())
    line.spines[["top", "right"]].set_visible(False)
    line.locator_params("y", nbins=4)
    together = math.ceil(len(steps) / COLUMNS)
    series = [("local share", line, (top, 0.0), local)]
    series += [(name, axes, (i - 0.5, i + 0.5), use[i]) for i, name in enumerate(sites.names)]
    for first in range(0, len(steps), together):
        last = min(first + together, len(steps))
        steps_text = f"at step {steps[first]}"
        if together > 1:
            steps_text = f"at steps {steps[first]} to {steps[last - 1]}"
        for row, panel, (above, below), shares in series:
            box = (float(edges[first]), above, float(edges[last]), below)
            low, high = share_text(shares[first:last].min()), share_text(shares[first:last].max())
            text = f"{steps_text}: {low}" if low == high else f"{steps_text}: {low} to {high}"
            frame.tooltips.append(Tooltip(panel, box, row, text, high != share_text(0.0)))
    colour_bar(frame, mesh, [line, axes], "share of all choices in its pool, %", size=0.75)
    return frame


def task_distance(routing: dict[str, Any]) -> FigureFrame | None:
    """Draw the distance between the tasks' routes, task × task; None below two tasks."""
    names = (routing.get("task_distance") or {}).get("tasks") or []
    if len(names) < 2:
        return None
    matrix = np.asarray(routing["task_distance"]["matrix"], dtype=float)
    title = "Distance between the routes of two tasks"
    note = "0: the same routes; 1: no control in common. Mean over the sites."
    frame = new_frame(routing, title, note, height=min(4.4, 2.1 + 0.3 * len(names)))
    axes = frame.figure.add_subplot()
    mesh = draw_map(
        frame,
        axes,
        matrix,
        names,
        [f"to {name}" for name in names],
        highest=1.0,
        text=lambda row, column: f"{matrix[row, column]:.3f}",
        numbered=NUMBERED,
        number="{:.2f}".format,
    )
    axes.set_aspect("equal")
    name_ticks(axes, names, along="x", room=1.1)
    name_ticks(axes, names, along="y", room=1.1)
    colour_bar(frame, mesh, axes, "Jensen-Shannon distance", percent=False)
    return frame


def comparison(routing: dict[str, Any]) -> FigureFrame | None:
    """Draw this run's shares minus the other's, and each site's distance."""
    pair = routing.get("compare")
    if not pair:
        return None
    sites = Sites.of(routing)
    values = sites.in_pool(pair["difference"])
    title = f"Shares of this run minus those of {fitted(run_name(pair['run']), 2.4, 9.5, 'bold')}"
    frame = new_frame(routing, title, "Red: chosen more often here.", OWN, height=5.2)
    axes, bars = frame.figure.subplots(1, 2, width_ratios=[6, 1])

    def text(row: int, column: int) -> str:
        return f"{100 * values[row, column]:+.1f} points"

    mesh = draw_sites(
        frame,
        axes,
        sites,
        values,
        highest=peak(abs(values)),
        colours=difference_colours(),
        text=text,
        numbered=12,
        number=in_points,
    )
    sites.label(axes, "x", "control")
    sites.label(axes, "y", "site that chooses")
    draw_bars(
        frame,
        bars,
        pair["distance"],
        sites.names,
        row="distance",
        along="y",
        end=max(pair["distance"], default=0) * 1.05 or 1,
        text=lambda distance: f"{distance:.3f}",
    )
    bars.set_xlabel("Jensen-Shannon\ndistance")
    colour_bar(frame, mesh, [axes, bars], "difference of shares, points")
    return frame


def ablation(routing: dict[str, Any]) -> FigureFrame | None:
    """Draw how much the loss rises at each site when its routes become the local control."""
    entries = routing.get("ablation")
    if not entries:
        return None
    by_name = {site["name"]: site for site in routing["sites"]}
    sites = Sites.of({"sites": [by_name[entry["site"]] for entry in entries]})
    note = (
        "Loss: over the tokens of the answer, or of the label, in nats. Above 0: the route helps. "
        "Whiskers: one standard error over the rows."
    )
    title = "Which routes matter: the loss with the local control instead"
    frame = new_frame(routing, title, note, height=2.9)
    axes = frame.figure.add_subplot()
    for block, colour in BLOCK_COLOURS.items():
        members = sites.members(block)
        if members:
            change = [entries[index]["loss_change"] for index in members]
            error = [entries[index]["stderr"] or 0.0 for index in members]
            axes.bar(members, change, color=colour, width=0.75, label=f"{BLOCK_WORDS[block]} site")
            axes.errorbar(members, change, yerr=error, fmt="none", ecolor=INK, elinewidth=0.6)
    axes.axhline(0, color=EDGE, lw=0.6)
    axes.set_xlim(-0.8, len(entries) - 0.2)
    axes.set_ylabel("change of a row's loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    sites.label(axes, "x", "site")
    low, high = axes.get_ylim()
    for place, entry in enumerate(entries):
        error_text = "" if entry["stderr"] is None else f" ± {entry['stderr']:.2g}"
        text = f"{entry['site']}: {entry['loss_change']:+.3g}{error_text}"
        box = (place - 0.5, high, place + 0.5, low)
        frame.tooltips.append(Tooltip(axes, box, "change of the loss", text))
    return frame


FIGURES = {
    "routing-map": site_map,
    "routing-cross": cross_types,
    "routing-layers": layer_maps,
    "routing-tasks": task_maps,
    "routing-history": history,
    "routing-distance": task_distance,
    "routing-compare": comparison,
    "routing-ablation": ablation,
}


def draw_figures(routing: dict[str, Any]) -> dict[str, FigureFrame]:
    """Return the figures by name, laid out, of all that `routing` has data for."""
    with figure_style():
        frames = {name: draw(routing) for name, draw in FIGURES.items()}
        return {name: frame.settle() for name, frame in frames.items() if frame is not None}
