"""Loss curves of several runs as one picture, PNG and SVG."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moc_cli.comparison.conditions import batch
from moc_cli.comparison.runs import Run
from moc_cli.files import write_bytes_atomic

# Okabe and Ito's colours, told apart by colour-blind eyes too; yellow is left out, being faint on
# white. Lines beyond them differ in their dashes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*"
SMOOTHED = 20  # the moving mean reaches over one in so many of a curve's points, to either side
WIDE = 10  # a loss that falls by this factor is drawn on a logarithmic axis


def draw_curves(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write loss.png and loss.svg; return where they are, nothing where no run has a loss yet."""
    if not any(_points(run, True)[0].size or _held_out(run, True)[0].size for run in runs):
        return []
    from matplotlib import rc_context

    figure = _figure(runs)
    paths = []
    for suffix in ("png", "svg"):
        stream = io.BytesIO()
        # Without a date and random names the same runs give the same file.
        metadata = {"Date": None} if suffix == "svg" else None
        with rc_context({"svg.hashsalt": "moc"}):
            figure.savefig(stream, format=suffix, dpi=150, metadata=metadata)
        paths.append(folder / f"loss.{suffix}")
        write_bytes_atomic(paths[-1], stream.getvalue())
    return paths


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean around each value (n,), of fewer values towards the ends; few stay as is."""
    width = len(values) // SMOOTHED if len(values) >= 2 * SMOOTHED else 0
    sums = np.concatenate([[0.0], np.cumsum(values)])
    here = np.arange(len(values))
    # As many to the left as to the right, so that a falling curve is not held up at its ends.
    reach = np.minimum(width, np.minimum(here, len(values) - 1 - here))
    smoothed: np.ndarray = (sums[here + reach + 1] - sums[here - reach]) / (2 * reach + 1)
    return smoothed


def _figure(runs: Sequence[Run]) -> Any:
    from matplotlib.figure import Figure  # not pyplot: no window system, no global state

    by_step = len({batch(run) for run in runs}) == 1
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    drawn = []
    for number, run in enumerate(runs):
        color = COLORS[number % len(COLORS)]
        dashes = DASHES[number // len(COLORS) % len(DASHES)]
        where, loss = _points(run, by_step)
        if loss.size:
            axes.plot(where, loss, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(where, smooth(loss), dashes, color=color, linewidth=1.8, label=run.name)
        where, held = _held_out(run, by_step)
        if held.size:
            # Hollow, so that one run's points do not hide another's.
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(
                *(where, held, marker),
                color=color,
                markersize=7,
                markerfacecolor="none",
                markeredgewidth=1.6,
                label=f"{run.name}, held out",
            )
        drawn.append(np.concatenate([loss, held]))
    every = np.concatenate(drawn)
    every = every[np.isfinite(every)]
    if every.size and every.min() > 0 and every.max() > WIDE * every.min():
        axes.set_yscale("log")
    axes.set_title("Loss of " + (" and ".join(r.name for r in runs) if len(runs) < 3 else "runs"))
    axes.set_xlabel("optimizer step" if by_step else "epoch")
    axes.set_ylabel("loss (faint: as logged; bold: moving mean)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small", ncols=1 if len(runs) < 7 else 2)
    return figure


def _points(run: Run, by_step: bool) -> tuple[np.ndarray, np.ndarray]:
    lines = [line for line in run.lines if line.get("loss") is not None]
    return _arrays(lines, [line["loss"] for line in lines], by_step)


def _held_out(run: Run, by_step: bool) -> tuple[np.ndarray, np.ndarray]:
    lines = [line for line in run.lines if line.get("eval", {}).get("loss") is not None]
    return _arrays(lines, [line["eval"]["loss"] for line in lines], by_step)


def _arrays(
    lines: Sequence[dict[str, Any]], values: Sequence[float], by_step: bool
) -> tuple[np.ndarray, np.ndarray]:
    where = [line["step" if by_step else "epoch"] for line in lines]
    return np.array(where, dtype=float), np.array(values, dtype=float)
