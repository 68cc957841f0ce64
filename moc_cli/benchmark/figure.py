"""A benchmark as one figure, PNG and SVG: bars, or lines over the values of the one varied key."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from moc_cli.report.figure_style import COLOURS, FigureFrame, figure_style, fitted

PICTURES = ("bench.png", "bench.svg")
MARKERS = "osD^vP*"
Entries = Mapping[str, Mapping[str, Any]]


def draw_benchmark(results: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the pictures by their names, from what `moc bench --json` prints."""
    entries, key = results["methods"], varied(results["methods"])
    training = results["measured"] == "training"
    speed = ("step_seconds", "seconds a step") if training else ("tokens_per_second", "tokens/s")
    panels = [speed]
    if all(entry["peak_bytes"] for entry in entries.values()):
        panels.append(("peak_bytes", "peak memory, GB"))
    elif training:
        panels.append(("tokens_per_second", "tokens/s"))
    layers = "" if results["layers"] is None else f", {results['layers']} layers"
    title = f"{'Training' if training else 'Generation'} of {results['model']}{layers}"
    device = results["environment"]["device"]
    note = f"{device['name']}; medians of {results['repeats']} turns, with 95 % intervals"
    height = 3.0 if key else 0.7 + 0.28 * len(entries)
    with figure_style():
        frame = FigureFrame(title, note, "", height=height)
        for place, (value, label) in enumerate(panels, 1):
            axes = frame.figure.add_subplot(1, len(panels), place)
            if key:
                _draw_lines(axes, entries, value, key)
                axes.set_ylabel(label)
            else:
                _draw_bars(axes, entries, value)
                axes.set_xlabel(label)
                if place > 1:
                    axes.set_yticklabels([])
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        return frame.files(PICTURES)


def varied(entries: Entries) -> str | None:
    """Return the one key that has several numbers as values; None where it is not so."""
    values: dict[str, set[float]] = {}
    for entry in entries.values():
        for change in entry["changes"]:
            key, _, text = change.partition("=")
            try:
                values.setdefault(key, set()).add(float(text))
            except ValueError:
                return None
    several = [key for key, numbers in values.items() if len(numbers) > 1]
    return several[0] if len(values) == 1 and several else None


def _draw_bars(axes: Axes, entries: Entries, value: str) -> None:
    heights = [_amount(entry, value) for entry in entries.values()]
    places = range(len(entries))[::-1]
    axes.barh(places, heights, height=0.6, color=COLOURS[0])
    for place, entry in zip(places, entries.values(), strict=True):
        if bounds := entry["interval"].get(value):
            axes.plot(bounds, [place, place], color="black", linewidth=1)
    axes.set_yticks(places, [fitted(name, 2.0, 7) for name in entries])


def _draw_lines(axes: Axes, entries: Entries, value: str, key: str) -> None:
    """A line over the key's values for each method; a method without the key is a level."""
    for number, method in enumerate(dict.fromkeys(e["method"] for e in entries.values())):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        method_entries = [entry for entry in entries.values() if entry["method"] == method]
        with_key = [entry for entry in method_entries if entry["changes"]]
        if not with_key:
            axes.axhline(
                _amount(method_entries[0], value), linestyle="--", color=colour, label=method
            )
            continue
        positions = [float(entry["changes"][0].partition("=")[2]) for entry in with_key]
        amounts = [_amount(entry, value) for entry in with_key]
        axes.plot(positions, amounts, marker + "-", color=colour, label=method, markersize=4)
        _draw_intervals(axes, with_key, positions, value, colour)
        axes.set_xticks(positions, [f"{place:g}" for place in positions])
    axes.set_xlabel(key)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _draw_intervals(
    axes: Axes, entries: Sequence[Mapping[str, Any]], where: list[float], value: str, colour: str
) -> None:
    for place, entry in zip(where, entries, strict=True):
        if bounds := entry["interval"].get(value):
            axes.plot([place, place], bounds, color=colour, linewidth=1)


def _amount(entry: Mapping[str, Any], value: str) -> float:
    amount = float(entry[value])
    return amount / 1e9 if value == "peak_bytes" else amount
