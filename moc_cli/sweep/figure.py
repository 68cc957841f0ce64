"""A sweep as one figure, PNG and SVG: each task's differences to the reference, or its scores."""

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes

from moc_cli.report.figure_style import COLOURS, FigureFrame, figure_style, fitted
from moc_cli.report.sweep_tables import average_name, averaged, line_name

PICTURES = ("sweep.png", "sweep.svg")
Summary = Mapping[str, Any]
Point = tuple[float, float | None, float | None]  # the value, and its two ends


def draw_sweep(summary: Summary) -> dict[str, bytes]:
    """Return the pictures by their names, from what `moc sweep --json` prints; none without runs.

    With a reference: differences of means with intervals over items and seeds. Without: medians
    with the lowest and the highest seed.
    """
    lines = _lines(summary)
    if not lines:
        return {}
    values = list(dict.fromkeys(value for points in lines.values() for value in points))
    reference = summary["reference"]
    note = (
        f"mean over seeds minus that of {reference}; intervals: {summary['confidence']:.0%}, "
        "bootstrap over items and seeds"
        if reference
        else "median over seeds; lines: from the lowest to the highest seed"
    )
    with figure_style():
        height = 0.6 + len(lines) * (0.12 + 0.13 * len(values))
        frame = FigureFrame(f"Sweep {summary['sweep']}", note, "", height=height)
        axes = frame.figure.add_subplot()
        for number, value in enumerate(values):
            _draw_value(axes, lines, value, number, len(values))
        if reference:
            axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(lines)), [fitted(name, 2.0, 7) for name in lines])
        axes.invert_yaxis()
        axes.set_xlabel("difference, hundredths" if reference else "score, hundredths")
        axes.grid(axis="x", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        return frame.files(PICTURES)


def _draw_value(
    axes: Axes, lines: Mapping[str, Mapping[str, Point]], value: str, number: int, count: int
) -> None:
    """One colour: a point in each line that has the value, with its interval."""
    colour = COLOURS[number % len(COLOURS)]
    offset = (number - (count - 1) / 2) * 0.8 / count
    places = [place for place, points in enumerate(lines.values()) if value in points]
    shown = [points[value] for points in lines.values() if value in points]
    for place, (_, low, high) in zip(places, shown, strict=True):
        if low is not None and high is not None:
            axes.plot([100 * low, 100 * high], [place + offset] * 2, color=colour, linewidth=1)
    middles = [100 * middle for middle, _, _ in shown]
    axes.plot(middles, [place + offset for place in places], "o", color=colour, label=value, ms=4)


def _lines(summary: Summary) -> dict[str, dict[str, Point]]:
    """Return the points of each line of the figure, by the values that are compared."""
    reference = summary["reference"]
    lines: dict[str, dict[str, Point]] = {}
    for row in summary["rows"]:
        scores = {value: cell["tasks"] for value, cell in row["cells"].items()}
        for value, tasks in (row["differences"] if reference else scores).items():
            for task, entry in tasks.items():
                if reference:
                    point = (entry["mean"], entry["low"], entry["high"])
                else:
                    point = (entry["median"], min(entry["values"]), max(entry["values"]))
                name = line_name(row["name"], task, entry["metric"])
                lines.setdefault(name, {})[value] = point
    for value, entry in averaged(summary).items():
        if "difference" in entry:
            point = (entry["difference"], entry["low"], entry["high"])
            lines.setdefault(average_name(summary), {})[value] = point
    return lines
