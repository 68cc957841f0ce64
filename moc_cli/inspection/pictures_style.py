"""How every picture looks: colours, letters, ticks, titles and the file's bytes.

Nothing here depends on the user's matplotlibrc, on the date or on a font that must be fetched, so
that the same routing.json gives the same SVG, byte for byte.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path

WIDTH = 6.0  # inches: the text width of a page
PNG_DPI = 200
SVG_DPI = 300  # of the maps' cells inside an SVG; letters and lines are curves
NEVER = "#eceef2"  # a control that was never chosen
BLANK = (1.0, 1.0, 1.0, 0.0)
PALE = "#e2edbf"  # towards which the smallest shares go
INK, FAINT, EDGE = "#1d2330", "#5b6473", "#9aa1ad"
BLOCK_COLOURS = {"attn": "#0072b2", "ffn": "#d55e00"}  # Okabe and Ito: safe for the colour-blind
BLOCK_WORDS = {"attn": "attention", "ffn": "FFN"}
SMALLEST = 1e-12  # below this a share counts as never
MARGIN = 0.12  # inches around the letters
LINE = 1.45  # of a letter's height

SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "moc",
    "svg.fonttype": "path",
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "axes.edgecolor": EDGE,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "xtick.color": EDGE,
    "ytick.color": EDGE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw and save inside this: our settings over matplotlib's own, whatever the user's are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def shares() -> Colormap:
    """Light grey for never, then viridis from light to dark; blank outside the pool.

    The light end is paler than viridis has it: a map full of small shares shall not shout.
    """
    steps = matplotlib.colormaps["viridis_r"](np.linspace(0.12, 1.0, 256))[:, :3]
    paler = np.clip(np.linspace(0.75, -1.0, 256), 0, 1)[:, None]
    steps = paler * np.array(to_rgb(PALE)) + (1 - paler) * steps
    colours = LinearSegmentedColormap.from_list("share", steps, N=512)
    return colours.with_extremes(under=NEVER, bad=BLANK)


def differences() -> Colormap:
    """Blue for less, red for more, light grey for the same; blank outside the pool."""
    ends = ["#08306b", "#2171b5", "#9ecae1", "#f1f1f1", "#f4a582", "#c8402f", "#67001f"]
    colours = LinearSegmentedColormap.from_list("difference", ends, N=511)
    return colours.with_extremes(bad=BLANK)


@dataclass
class Sheet:
    """A figure with a title above and a caption below the part that holds axes."""

    title: str
    subtitle: str
    caption: str
    height: float
    figure: Figure = field(init=False)

    def __post_init__(self) -> None:
        room = WIDTH - 2 * MARGIN
        lines = wrapped(self.caption, room, 6.5)
        below = MARGIN + len(lines) * 6.5 * LINE / 72
        above = MARGIN + 9.5 * LINE / 72 + 7 * LINE / 72
        height = self.height + above + below
        size = (WIDTH, height)
        self.figure = Figure(size, dpi=PNG_DPI, facecolor="white", layout="constrained")
        FigureCanvasAgg(self.figure)
        engine = self.figure.get_layout_engine()
        assert engine is not None
        side = MARGIN / 2 / WIDTH
        box = (side, below / height, 1 - 2 * side, 1 - (above + below) / height)
        engine.set(rect=box)  # type: ignore[call-arg]
        top = 1 - MARGIN / height
        left = MARGIN / WIDTH
        write = self.figure.text
        write(left, top, fitted(self.title, room, 9.5, "bold"), size=9.5, weight="bold", va="top")
        second = top - 9.5 * LINE / 72 / height
        write(left, second, fitted(self.subtitle, room, 7), size=7, color=FAINT, va="top")
        foot = (below - MARGIN * 0.3) / height
        text = "\n".join(lines)
        write(left, foot, text, size=6.5, color=FAINT, va="top", linespacing=LINE - 0.25)


def width_of(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of a line of text in inches, for letters of `size` points."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, False)[0]) / 72


def plain(text: str) -> str:
    """Return one line of letters that the font has; others become a question mark."""
    known = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    line = " ".join(str(text).split())
    return "".join(letter if ord(letter) in known else "?" for letter in line)


def fitted(text: str, room: float, size: float, weight: str = "normal") -> str:
    """Return the text, its middle left out where it is wider than `room` inches."""
    text = plain(text)
    if width_of(text, size, weight) <= room:
        return text
    least, most = 0, len(text)  # letters that may stay: found by halving
    while least < most:
        keep = (least + most + 1) // 2
        if width_of(_without_middle(text, keep), size, weight) <= room:
            least = keep
        else:
            most = keep - 1
    return _without_middle(text, least)


def wrapped(text: str, room: float, size: float) -> list[str]:
    """Return the text in lines of at most `room` inches, broken between words."""
    lines: list[str] = []
    for word in plain(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(fitted(word, room, size))
    return lines


def _without_middle(text: str, keep: int) -> str:
    tail = keep // 2
    return f"{text[: keep - tail].rstrip()}…{text[len(text) - tail :].lstrip()}"


def draw_map(
    axes: Axes, values: np.ndarray, *, highest: float, colours: Colormap | None = None
) -> QuadMesh:
    """Draw a matrix, row 0 on top; NaN cells stay blank. Cells meet the pixels' edges.

    `highest` is the value of the darkest colour; a difference map runs from -highest to it.
    """
    signed = colours is not None
    rows, columns = values.shape
    mesh = axes.pcolormesh(
        np.arange(columns + 1) - 0.5,
        np.arange(rows + 1) - 0.5,
        np.ma.masked_invalid(values),
        cmap=colours or shares(),
        norm=Normalize(-highest if signed else SMALLEST, highest),
        rasterized=True,  # thousands of cells as one picture: small files and no hairlines
        antialiased=False,
    )
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    return mesh


def mark_cells(axes: Axes, cells: Sequence[tuple[int, int]]) -> None:
    """Outline the (row, column) cells of a block's own control, thinly."""
    squares = [
        [(x - 0.5, y - 0.5), (x + 0.5, y - 0.5), (x + 0.5, y + 0.5), (x - 0.5, y + 0.5)]
        for y, x in cells
    ]
    closed = [[*square, square[0]] for square in squares]
    axes.add_collection(LineCollection(closed, colors=EDGE, linewidths=0.45), autolim=False)


def colour_bar(sheet: Sheet, mesh: QuadMesh, axes: Any, label: str, *, size: float = 0.8) -> None:
    """Add the scale of the colours with its unit; what was never chosen stands in the caption."""
    bar = sheet.figure.colorbar(mesh, ax=axes, shrink=size, aspect=28, pad=0.015)
    bar.set_label(label)
    bar.outline.set_linewidth(0.5)  # type: ignore[operator]


def layer_ticks(axes: Axes, layers: Sequence[int], *, along: str, most: int = 16) -> None:
    """Number every layer, or every 2nd, 4th, 5th … so that at most `most` numbers stand.

    `layers` holds the layer of each row or column; a number stands amid its layer's cells.
    """
    distinct = list(dict.fromkeys(layers))
    step = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 1000) if len(distinct) <= most * step)
    shown = distinct[::step]
    at = [float(np.mean([i for i, own in enumerate(layers) if own == layer])) for layer in shown]
    _ticks(axes, at, [str(layer) for layer in shown], along, turn=False)


def name_ticks(axes: Axes, names: Sequence[str], *, along: str, room: float = 0.9) -> None:
    """Name every row or column, each within `room` inches."""
    shown = [fitted(name, room, 6.5) for name in names]
    _ticks(axes, list(range(len(names))), shown, along, turn=True)


def _ticks(axes: Axes, at: Sequence[float], names: list[str], along: str, *, turn: bool) -> None:
    if along == "x":
        axes.set_xticks(at, names, rotation=90 if turn else 0)
    else:
        axes.set_yticks(at, names)
    if turn:
        axes.tick_params(along, labelsize=6.5)


def settle(figure: Figure) -> Figure:
    """Lay the figure out once for all files; return it.

    The solver's last digits differ from call to call, so the places are rounded: else the SVG's
    identifiers, which are hashes of them, would differ too.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        place = axes.get_position(original=True).bounds
        axes.set_position([round(number, 5) for number in place])  # type: ignore[arg-type]
    return figure


def to_png(figure: Figure) -> bytes:
    """Return the figure as a PNG of 200 dots an inch."""
    return _saved(figure, "png", PNG_DPI, {"Software": None})


def to_svg(figure: Figure) -> bytes:
    """Return the figure as an SVG without a date, its identifiers from the content alone."""
    return _saved(figure, "svg", SVG_DPI, {"Date": None, "Creator": None})


def _saved(figure: Figure, kind: str, dpi: int, metadata: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, dpi=dpi, metadata=metadata)
    return stream.getvalue()
