"""The page of `moc inspect-routing`: one file without a script, every value of a figure in it."""

import base64
import hashlib
import re
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from support.routing import NASTY, TASKS, full_routing, named, routing_of

from moc_cli.inspection.figures import FIGURES, draw_figures
from moc_cli.inspection.page import TOKENS, build_page
from moc_cli.inspection.results import write_figures
from moc_cli.report.figure_style import DPI, FigureFrame, figure_style


class Page(HTMLParser):
    """A page as its elements: (tag, attributes, text within it), and the rows of its tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[list[str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))
        self._open.append(self.elements[-1][2])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for texts in self._open:
            texts.append(data)

    def texts(self, tag: str, **attributes: str) -> list[str]:
        """Return what stands in the elements of that tag and those attributes."""
        return [
            "".join(text)
            for name, own, text in self.elements
            if name == tag and attributes.items() <= own.items()
        ]

    def titles(self) -> list[str]:
        """Return the tooltips of the figures."""
        return self.texts("title")[1:]  # the first one is the page's


def section_of(text: str, name: str) -> Page:
    """Return one section of a page."""
    section = text[text.index(f'<section id="{name}"') :]
    return Page(section[: section.index("</section>")])


@pytest.fixture(scope="module")
def full() -> tuple[dict[str, Any], dict[str, FigureFrame], str]:
    """A routing with something for every figure, the figures, and the page."""
    routing = full_routing(12, 3, 2)
    with figure_style():
        frames = draw_figures(routing)
        figures = {name: (frame, frame.save("svg")) for name, frame in frames.items()}
    return routing, frames, build_page(routing, figures)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[Path]]:
    """A routing with difficult names, and all files that are drawn from it."""
    routing = named(full_routing(4), NASTY + "$style <!-- ]]>")
    routing["warnings"] = [{"name": "one_token", "message": NASTY, "key": "</code>"}]
    return routing, write_figures(routing, tmp_path_factory.mktemp("nasty"))


def test_every_picture_is_written_and_readable(nasty) -> None:
    paths = nasty[1]
    expected = {f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")} | {"routing.html"}
    assert {path.name for path in paths} == expected
    assert {*paths} == {*paths[0].parent.iterdir()}
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = struct.unpack(">II", path.read_bytes()[16:24])
            assert width == 6 * DPI["png"]
            assert 400 < height < 2800
        elif path.suffix == ".svg":
            root = ElementTree.fromstring(path.read_text())
            assert root.get("width") == "432pt"  # 6 inches


def test_every_cell_of_the_map_has_its_values_as_a_title(full) -> None:
    routing, _, text = full
    titles = Page(text).titles()
    names = [site["name"] for site in routing["sites"]]
    for row, site in enumerate(names):
        for column, control in enumerate(names):
            share, times, weight, probability = (
                routing[key][row][column] for key in ("share", "counts", "weight", "probability")
            )
            value = f"{100 * share:.1f} %" if share else "never"
            means = f"mean weight {weight:.3g}, mean probability {probability:.3g}"
            assert f"{site} chooses {control}: {value}, {times} times, {means}" in titles
    for name, task in routing["tasks"].items():
        for row, column in ((0, 1), (7, 3), (11, 11)):
            if share := task["share"][row][column]:
                title = f"{name}: {names[row]} chooses {names[column]}: {100 * share:.1f} %"
                assert title in titles
    for entry in routing["ablation"]:
        change = f"{entry['loss_change']:+.3g} ± {entry['stderr']:.2g}"
        assert f"change of the loss {entry['site']}: {change}" in titles


def test_titles_lie_over_their_cells(full) -> None:
    """The cells of the map fill its frame row by row, and each is where the figure has it."""
    routing, frames, text = full
    frame = frames["routing-map"]
    axes = next(axes for axes in frame.figure.axes if axes.get_ylabel() == "site that chooses")
    left, bottom, width, height = axes.get_position().bounds
    across, down = frame.figure.get_size_inches() * 72
    svg = text[text.index('<section id="routing-map"') : text.index("</svg>")]
    marks = re.findall(
        r'd="M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H[\d.]+z"><title>(\S+) chooses', svg
    )
    assert len(marks) == 144
    for index, (x, y, end, foot, site) in enumerate(marks):
        row, column = divmod(index, 12)
        assert site == routing["sites"][row]["name"]
        assert float(x) == pytest.approx((left + column * width / 12) * across, abs=0.1)
        assert float(end) == pytest.approx((left + (column + 1) * width / 12) * across, abs=0.1)
        top = 1 - bottom - height
        assert float(y) == pytest.approx((top + row * height / 12) * down, abs=0.1)
        assert float(foot) == pytest.approx((top + (row + 1) * height / 12) * down, abs=0.1)


def test_every_value_stands_as_text_too(full) -> None:
    """Who cannot point reads the same values in the table below each figure."""
    _, frames, text = full
    for name, frame in frames.items():
        section = section_of(text, name)
        cells = section.texts("td")
        values = {part for cell in cells for part in cell.split("; ")}
        listed = {tip.text for tip in frame.tooltips if tip.listed}
        assert listed
        assert values == listed
        for row in {tip.row for tip in frame.tooltips if tip.listed}:
            assert row in section.texts("th")


def test_the_page_loads_nothing_and_runs_nothing(full) -> None:
    *_, text = full
    assert "://" not in text
    page = Page(text)
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes, _ in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "style")]
        place = attributes.get("href") or "#"
        assert place.startswith(("#", "data:image/png;base64,"))
    style = page.texts("style")
    assert len(style) == 1
    assert not re.search(r"@import|url\(", style[0])
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    policy = next(own["content"] for _, own, _ in page.elements if "http-equiv" in own)
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"


def test_identifiers_are_unique_and_what_refers_to_them_finds_them(full) -> None:
    *_, text = full
    elements = Page(text).elements
    names = [own["id"] for _, own, _ in elements if "id" in own]
    assert len(names) == len(set(names))
    places = [own.get("href") or "" for _, own, _ in elements]
    used = {place[1:] for place in places if place.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]*)\)", text))
    assert used <= set(names)


def test_the_page_is_readable_in_the_dark(full) -> None:
    """Every colour of the page has a dark twin; the figures bring their own white ground."""
    style = Page(full[2]).texts("style")[0]
    light, dark = (set(re.findall(r"(--\w+):", part)) for part in style.split("@media")[:2])
    assert "prefers-color-scheme: dark" in style
    assert light == dark == set(re.findall(r"var\((--\w+)\)", style))
    assert re.search(r"^svg \{[^}]*background: #fff", style, re.MULTILINE)


def test_names_cannot_leave_their_place_in_the_page(full, nasty) -> None:
    routing, paths = nasty
    page, plain = Page(paths[-1].read_text()), Page(full[2])
    assert {tag for tag, _, _ in page.elements} == {tag for tag, _, _ in plain.elements}
    assert page.texts("p", **{"class": "warning"}) == [f"Warning: {NASTY}"]
    name = list(routing["tasks"])[0]
    assert name.endswith("$style <!-- ]]>")
    assert any(title.startswith(f"{name}: 0.attn chooses") for title in page.titles())


def test_a_number_that_json_cannot_spell_is_a_dash() -> None:
    routing = routing_of(12, TASKS[:1])
    routing["per_site"][3]["gate_entropy"] = float("nan")
    cells = Page(build_page(routing, {})).texts("td")
    assert "–" in cells
    assert "nan" not in cells


def test_the_page_without_charts_is_complete() -> None:
    """No history, one task, no comparison: their sections go, the tables stay."""
    routing = routing_of(4, TASKS[:1], history=[])
    empty = b'<svg viewBox="0 0 1 1"/>'  # this test looks at no picture
    figures = {name: (frame, empty) for name, frame in draw_figures(routing).items()}
    page = Page(build_page(routing, figures))
    sections = [own["id"] for tag, own, _ in page.elements if tag == "section"]
    figures = ["routing-map", "routing-cross", "routing-layers"]
    assert sections == [*figures, "summary", "sites", "controls"]
    assert page.texts("th", scope="row").count("1.ffn") == 2
    assert page.texts("h2") == ["Summary", "Sites", "Controls"]


def test_a_text_shows_each_token_and_its_vote() -> None:
    routing = routing_of(12, TASKS[:1], history=[], text="Water <b>boils") | {"tasks": {}}
    routing["tokens"] = {
        "tokens": ["Water", " <b>", "boils"],
        "votes": [[1, 2, 2]] * 11 + [[5, 4, 3]],
        "probability": [[0.25, 0.5, 0.125]] * 12,
        "choice": [[2]] * 11 + [[4]],
        "margin": [0.0625] * 12,
    }
    cells = section_of(build_page(routing, {}), "tokens").texts("td")
    assert cells.count("0.ffn 25.0 %") == 11
    assert cells.count("1.attn 50.0 % ✓") == 11
    assert cells.count("2.attn 50.0 % ✓") == 1
    assert cells.count("2.ffn 25.0 %") == 1
    assert cells.count("1.attn") == 11
    assert cells.count("0.0625") == 12
    assert " <b>" in section_of(build_page(routing, {}), "tokens").texts("th")

    # Where every token chooses for itself, each is compared with its own choice.
    routing["level"] = "token"
    routing["tokens"]["choice"] = [[2, 2, 3]] * 11 + [[5, 4, 4]]
    cells = section_of(build_page(routing, {}), "tokens").texts("td")
    assert cells.count("1.attn 50.0 % ✓") == 11
    assert cells.count("1.attn 12.5 %") == 11
    assert cells.count("2.ffn 25.0 % ✓") == 1


def test_a_long_text_is_cut_and_the_page_says_so() -> None:
    routing = routing_of(4, TASKS[:1], history=[], text="long") | {"tasks": {}}
    count = TOKENS + 1
    routing["tokens"] = {
        "tokens": [f"w{number}" for number in range(count)],
        "votes": [[0] * count] * 4,
        "probability": [[0.5] * count] * 4,
        "choice": [[0]] * 4,
        "margin": [0.1] * 4,
    }
    text = build_page(routing, {})
    assert f"The first {TOKENS} of {count} tokens." in text
    assert f"w{TOKENS - 1}" in Page(text).texts("th")
    assert f"w{TOKENS}" not in Page(text).texts("th")
