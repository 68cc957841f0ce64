"""How every figure looks and how it is saved: colours, letters, title and caption, PNG and SVG.

Nothing depends on the user's matplotlibrc, on the date or on an installed font, so that the same
data give the same files, byte for byte.
"""

import contextlib
import io
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, Self

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.textpath import text_to_path

WIDTH = 6.0  # inches: the text width of a page
MARGIN = 0.12  # inches around the letters
LINE = 1.45  # height of a line, in letter sizes
TITLE, SUBTITLE, SMALL = 9.5, 7.0, 6.5  # letter sizes in points
DPI = {"png": 200, "svg": 300}  # an SVG holds the cells of a map as an image, all else as curves
INK, FAINT, EDGE = "#1d2330", "#5b6473", "#9aa1ad"
# Okabe and Ito's colours, which colour-blind eyes tell apart too; yellow is too faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")

SETTINGS: Any = {
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
def figure_style() -> Iterator[None]:
    """Draw and save inside this: our settings over matplotlib's defaults, whatever the user's."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


@dataclass(frozen=True)
class Tooltip:
    """A value of a figure: shown where the pointer is inside `box`, and in the row `row` of a list.

    `box` is (left, top, right, bottom) in the data coordinates of the axes. Values that are not
    `listed` (a control that was never chosen) would only lengthen the list.
    """

    axes: Axes
    box: tuple[float, float, float, float]
    row: str
    text: str
    listed: bool = True


class FigureFrame:
    """A figure with a title above and a caption below the part that holds axes.

    `height` is the height of that part in inches; `tooltips` are the values that it shows.
    """

    def __init__(self, title: str, subtitle: str, caption: str, height: float) -> None:
        self.title, self.caption = title, caption
        self.tooltips: list[Tooltip] = []
        room = WIDTH - 2 * MARGIN
        lines = wrapped(caption, room, SMALL)
        below = MARGIN + len(lines) * SMALL * LINE / 72
        above = MARGIN + (TITLE + SUBTITLE) * LINE / 72
        total = height + above + below
        side = MARGIN / 2 / WIDTH
        layout = ConstrainedLayoutEngine(rect=(side, below / total, 1 - 2 * side, height / total))
        self.figure = Figure((WIDTH, total), dpi=DPI["png"], facecolor="white", layout=layout)
        left, top = MARGIN / WIDTH, 1 - MARGIN / total
        for text, y, size, weight, colour in (
            (title, top, TITLE, "bold", INK),
            (subtitle, top - TITLE * LINE / 72 / total, SUBTITLE, "normal", FAINT),
        ):
            shown = fitted(text, room, size, weight)
            self.figure.text(left, y, shown, size=size, weight=weight, color=colour, va="top")
        foot = (below - MARGIN * 0.3) / total
        spacing = LINE - 0.25
        text = "\n".join(lines)
        self.figure.text(left, foot, text, size=SMALL, color=FAINT, va="top", linespacing=spacing)

    def settle(self) -> Self:
        """Lay the figure out once for all files.

        The solver's last digits differ from call to call, so the places are rounded: else the SVG's
        identifiers, which are hashes of them, would differ too.
        """
        layout = self.figure.get_layout_engine()
        assert layout is not None
        layout.execute(self.figure)
        self.figure.set_layout_engine(None)  # "none" keeps one that draws twice
        for axes in self.figure.axes:
            left, bottom, width, height = axes.get_position(original=True).bounds
            axes.set_position((round(left, 5), round(bottom, 5), round(width, 5), round(height, 5)))
        return self

    def files(self, names: tuple[str, str]) -> dict[str, bytes]:
        """Lay the figure out, and return it as PNG and SVG, by these names."""
        self.settle()
        png, svg = names
        return {png: self.save("png"), svg: self.save("svg")}

    def save(self, kind: Literal["png", "svg"]) -> bytes:
        """Return the figure as a PNG of 200 dots an inch, or as an SVG, without a date."""
        stream = io.BytesIO()
        metadata = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        self.figure.savefig(stream, format=kind, dpi=DPI[kind], metadata=metadata)
        return stream.getvalue()


@cache
def width_of(text: str, size: float, weight: str = "normal") -> float:
    """Return the width of a line of text in inches, for letters of `size` points."""
    font = FontProperties(family="DejaVu Sans", size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, False)[0]) / 72


def printable(text: str) -> str:
    """Return one line of letters that the font has; others become a question mark."""
    letters = get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap()
    line = " ".join(str(text).split())
    return "".join(letter if ord(letter) in letters else "?" for letter in line)


def fitted(text: str, room: float, size: float, weight: str = "normal") -> str:
    """Return the text, its middle left out where it is wider than `room` inches."""
    text = printable(text)

    def shortened(letters: int) -> str:
        tail = letters // 2
        return f"{text[: letters - tail].rstrip()}…{text[len(text) - tail :].lstrip()}"

    if width_of(text, size, weight) <= room:
        return text
    longest = bisect_right(
        range(1, len(text)), room, key=lambda letters: width_of(shortened(letters), size, weight)
    )
    return shortened(longest)


def wrapped(text: str, room: float, size: float) -> list[str]:
    """Return the text in lines of at most `room` inches, broken between words."""
    lines: list[str] = []
    for word in printable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width_of(longer, size) <= room:
            lines[-1] = longer
        else:
            lines.append(fitted(word, room, size))
    return lines
