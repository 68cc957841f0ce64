"""Loss curves of several runs as one figure, PNG and SVG."""

from collections.abc import Sequence

import numpy as np

from moc_cli.comparison.conditions import batch
from moc_cli.comparison.runs import Run

# Lines beyond the number of colours differ in their dashes.
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*"
SMOOTHED = 20  # the moving mean reaches over one in so many of a curve's points, to either side
WIDE = 10  # a loss that falls by this factor is drawn on a logarithmic axis


PICTURES = ("loss.png", "loss.svg")


def draw_curves(runs: Sequence[Run]) -> dict[str, bytes]:
    """Return the pictures by their names; none where no run has a loss yet."""
    by_step = len({batch(run) for run in runs}) == 1
    logged = [_points(run, by_step=by_step, validation=False) for run in runs]
    validation = [_points(run, by_step=by_step, validation=True) for run in runs]
    losses = np.concatenate([loss for _, loss in (*logged, *validation)])
    if not losses.size:
        return {}
    from moc_cli.report.figure_style import COLOURS, FigureFrame, figure_style, fitted

    names = [fitted(run.name, 2.2, 7) for run in runs]
    title = "Loss of " + (" and ".join(names) if len(names) < 3 else f"{len(names)} runs")
    note = "Faint: as logged. Bold: moving mean. Hollow marks: on the validation rows."
    with figure_style():
        frame = FigureFrame(title, note, "", height=3.4)
        axes = frame.figure.add_subplot()
        for number, name in enumerate(names):
            colour = COLOURS[number % len(COLOURS)]
            dashes = DASHES[number // len(COLOURS) % len(DASHES)]
            positions, loss = logged[number]
            if loss.size:
                axes.plot(positions, loss, color=colour, alpha=0.25, linewidth=0.6)
                axes.plot(positions, smooth(loss), dashes, color=colour, linewidth=1.3, label=name)
            positions, loss = validation[number]
            if loss.size:
                # Hollow, so that one run's points do not hide another's.
                marker, label = MARKERS[number % len(MARKERS)], f"{name}, validation"
                (marks,) = axes.plot(positions, loss, marker, color=colour, label=label)
                marks.set(markersize=5, markerfacecolor="none", markeredgewidth=1.2)
        finite = losses[np.isfinite(losses)]
        if finite.size and finite.min() > 0 and finite.max() > WIDE * finite.min():
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("optimizer step" if by_step else "epoch")
        axes.set_ylabel("loss")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, ncols=1 if len(runs) < 7 else 2)
        return frame.files(PICTURES)


def smooth(values: np.ndarray) -> np.ndarray:
    """Return the mean around each value (n,), of fewer values towards the ends; few stay as is."""
    width = len(values) // SMOOTHED if len(values) >= 2 * SMOOTHED else 0
    sums = np.concatenate([[0.0], np.cumsum(values)])
    positions = np.arange(len(values))
    # As many to the left as to the right, so that a falling curve is not held up at its ends.
    reach = np.minimum(width, np.minimum(positions, len(values) - 1 - positions))
    smoothed: np.ndarray = (sums[positions + reach + 1] - sums[positions - reach]) / (2 * reach + 1)
    return smoothed


def _points(run: Run, *, by_step: bool, validation: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return where a run logged a loss, of training or of the validation rows, and the losses."""
    axis, points = "step" if by_step else "epoch", []
    for line in run.lines:
        loss = (line.get("eval", {}) if validation else line).get("loss")
        if loss is not None:
            points.append((line.get(axis), loss))
    places, losses = np.array(points, dtype=float).reshape(-1, 2).T
    return places, losses
