"""The pictures and the page of `moc inspect-routing`: what is drawn is what was recorded."""

import copy
import io
import json
import re
import struct
import warnings
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from support.browser import EXECUTABLE, Browser
from support.machine import absent
from support.routing import TASKS, ablated, compared, routing_of

from moc_cli.inspection import html, maps
from moc_cli.inspection.maps import Sites, control_by_layer
from moc_cli.inspection.pictures import DRAWERS, draw, figures
from moc_cli.inspection.pictures_charts import step_edges
from moc_cli.inspection.pictures_style import (
    PNG_DPI,
    SMALLEST,
    settle,
    shares,
    style,
    to_png,
    to_svg,
)

SHAPES = [(12, 1, 1), (64, 7, 8)]  # sites, top_k, tasks
ALWAYS = {"routing-map", "routing-cross", "routing-layers"}
NASTY = "</script><b>$x_1$ & “naïve” 任务 " + "long " * 30


def whole(sites: int = 24, top_k: int = 1, tasks: int = 2) -> dict[str, Any]:
    """Return a routing that has something for every picture."""
    routing = routing_of(sites, TASKS[:tasks], top_k=top_k)
    return routing | {"compare": compared(routing), "ablation": ablated(routing)}


def drawn(name: str, routing: dict[str, Any]) -> Figure:
    """Return one picture as it is before it is laid out."""
    with style():
        figure = DRAWERS[name](routing)
    assert figure is not None
    return figure


def meshes(figure: Figure) -> list[QuadMesh]:
    """Return the maps of a figure in reading order, without the colour bars."""
    maps = [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]
    return [c for axes in maps for c in axes.collections if isinstance(c, QuadMesh)]


def values(mesh: QuadMesh) -> np.ndarray:
    array = mesh.get_array()
    assert array is not None
    return np.ma.filled(np.ma.asarray(array, dtype=float), np.nan)


def words(figure: Figure) -> str:
    return " ".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize(("sites", "top_k", "tasks"), SHAPES)
def test_every_picture_is_written_and_readable(
    sites: int, top_k: int, tasks: int, tmp_path: Path
) -> None:
    routing = whole(sites, top_k, tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths = draw(routing, tmp_path)
    per_task = {"routing-tasks", "routing-distance"} if tasks > 1 else set()
    names = ALWAYS | per_task | {"routing-history", "routing-compare", "routing-ablation"}
    expected = {f"{name}.{kind}" for name in names for kind in ("png", "svg")} | {"routing.html"}
    assert {path.name for path in paths} == expected == {path.name for path in tmp_path.iterdir()}
    for path in paths:
        if path.suffix == ".png":
            assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
            width, height = struct.unpack(">II", path.read_bytes()[16:24])
            assert width == 6 * PNG_DPI
            assert 400 < height < 2800
        elif path.suffix == ".svg":
            root = ElementTree.fromstring(path.read_text())
            assert root.get("width") == "432pt"  # 6 inches
    assert (tmp_path / "routing-map.svg").stat().st_size < 200_000
    assert (tmp_path / "routing.html").stat().st_size < 2_000_000


def test_pictures_that_have_no_data_are_left_out() -> None:
    routing = routing_of(12, TASKS[:1]) | {"history": [], "tasks": {}}
    assert set(figures(routing)) == ALWAYS


def test_pictures_of_an_earlier_inspection_do_not_stay(tmp_path: Path) -> None:
    routing = routing_of(12, TASKS[:1])
    (tmp_path / "mine.png").write_bytes(b"kept")
    draw(routing | {"ablation": ablated(routing)}, tmp_path)
    assert (tmp_path / "routing-ablation.png").is_file()
    paths = draw(routing, tmp_path)
    assert set(tmp_path.iterdir()) == {*paths, tmp_path / "mine.png"}


def test_the_same_routing_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's matplotlibrc, the clock or the object's ids are."""
    routing = whole(12)

    def files() -> list[bytes]:
        with style():
            names = ("routing-layers", "routing-compare")
            settled = [settle(drawn(name, copy.deepcopy(routing))) for name in names]
            return [convert(figure) for figure in settled for convert in (to_svg, to_png)]

    first = files()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)
    monkeypatch.setitem(matplotlib.rcParams, "svg.hashsalt", None)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert files() == first
    assert matplotlib.rcParams["font.size"] == 20


def test_the_map_shows_every_share() -> None:
    routing = routing_of(60, TASKS[:2])
    (mesh,) = meshes(drawn("routing-map", routing))
    np.testing.assert_array_equal(values(mesh), np.array(routing["share"]))


def test_controls_outside_the_pool_stay_blank() -> None:
    routing = routing_of(24, TASKS[:2], split_pools=True)
    (mesh,) = meshes(drawn("routing-map", routing))
    shown = values(mesh)
    pools = np.array([site["pool"] for site in routing["sites"]])
    outside = pools[:, None] != pools[None, :]
    np.testing.assert_array_equal(np.isnan(shown), outside)
    np.testing.assert_array_equal(shown[~outside], np.array(routing["share"])[~outside])
    assert "not in their pool" in words(drawn("routing-cross", routing))


def test_the_four_panels_split_the_map_by_type() -> None:
    routing = routing_of(24, TASKS[:2])
    share = np.array(routing["share"])
    figure = drawn("routing-cross", routing)
    parts = [share[row::2, column::2] for row in (0, 1) for column in (0, 1)]
    for mesh, part in zip(meshes(figure), parts, strict=True):
        np.testing.assert_array_equal(values(mesh), part)
    for part in parts:
        assert f"({part.sum() / len(part):.0%})" in words(figure)


def test_the_layer_maps_average_over_the_blocks_of_a_layer() -> None:
    """Control k × layer, by the plain loop over the recorded shares."""
    routing = routing_of(24, TASKS[:2])
    figure = drawn("routing-layers", routing)
    for mesh, first in zip(meshes(figure), (0, 1), strict=True):
        for k, layer in np.ndindex(12, 12):
            control = 2 * k + first
            both = [routing["share"][2 * layer + block][control] for block in (0, 1)]
            assert values(mesh)[k, layer] == pytest.approx(sum(both) / 2)


def test_a_layer_without_one_block_type_is_averaged_over_what_it_has() -> None:
    routing = routing_of(6, TASKS[:1])
    for key in ("share", "counts"):
        routing[key] = [row[:5] for row in routing[key][:5]]
    routing["sites"] = routing["sites"][:5]  # layer 2 has no FFN site
    part = control_by_layer(Sites.of(routing), routing, "attn")
    assert part[1, 2] == routing["share"][4][2]
    split = [site | {"pool": site["block"]} for site in routing["sites"]]
    part = control_by_layer(Sites.of(routing | {"sites": split}), routing, "ffn")
    assert part[0, 1] == routing["share"][3][1]  # its attention block cannot choose it
    assert np.isnan(part[:, 2]).all()


def test_every_task_has_its_panel_on_one_scale() -> None:
    routing = routing_of(12, TASKS)
    figure = drawn("routing-tasks", routing)
    maps = meshes(figure)
    for mesh, entry in zip(maps, routing["tasks"].values(), strict=True):
        np.testing.assert_array_equal(values(mesh), np.array(entry["share"]))
    assert len({mesh.norm.vmax for mesh in maps}) == 1
    assert all(name in words(figure) for name in TASKS)


def test_charts_show_their_numbers() -> None:
    routing = whole(12)
    use = np.array([entry["use"] for entry in routing["history"]]).T
    np.testing.assert_array_equal(values(meshes(drawn("routing-history", routing))[0]), use)
    matrix = np.array(routing["task_distance"]["matrix"])
    np.testing.assert_array_equal(values(meshes(drawn("routing-distance", routing))[0]), matrix)
    assert f"{matrix[0, 1]:.2f}" in words(drawn("routing-distance", routing))
    difference = np.array(routing["compare"]["difference"])
    mesh = meshes(drawn("routing-compare", routing))[0]
    np.testing.assert_array_equal(values(mesh), difference)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-abs(difference).max(), abs(difference).max())
    bars = drawn("routing-ablation", routing).axes[0].patches
    tall = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in bars}
    assert tall == {i: e["loss_change"] for i, e in enumerate(routing["ablation"])}


def test_steps_keep_their_distances() -> None:
    assert step_edges([10, 20, 40]).tolist() == [5, 15, 30, 50]
    assert step_edges([7]).tolist() == [6.5, 7.5]


def test_one_choice_among_thousands_can_be_seen() -> None:
    """A single cell of 96 × 96 covers its pixels in its full colour; the rest is grey."""
    routing = routing_of(96, TASKS[:1])
    routing["share"] = np.zeros((96, 96)).tolist()
    routing["share"][40][71] = 1.0
    with style():
        picture = to_png(maps.site_map(routing))
    pixels = matplotlib.image.imread(io.BytesIO(picture))[..., :3]
    dark = np.all(abs(pixels - shares()(1.0)[:3]) < 0.005, axis=-1)
    inside = dark[:, : int(pixels.shape[1] * 0.86)]  # left of the colour bar
    ys, xs = np.nonzero(inside)
    side = (np.ptp(xs) + 1, np.ptp(ys) + 1)
    assert inside.sum() == side[0] * side[1]
    assert min(side) >= 8


def test_never_is_another_colour_than_the_smallest_share() -> None:
    mesh = meshes(drawn("routing-map", routing_of(12, TASKS[:1])))[0]
    never, least = (mesh.cmap(mesh.norm(value)) for value in (0.0, 2 * SMALLEST))
    assert max(abs(a - b) for a, b in zip(never, least, strict=True)) > 0.1
    light = [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b, _ in shares()(np.linspace(0, 1, 64))]
    assert all(a > b for a, b in zip(light, light[1:], strict=False)), "darker is more"


@pytest.mark.parametrize(("sites", "top_k", "tasks"), [(24, 3, 2), (64, 7, 8)])
def test_no_letter_leaves_the_picture_and_no_tick_covers_another(
    sites: int, top_k: int, tasks: int
) -> None:
    routing = named(whole(sites, top_k, tasks), NASTY)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # also a letter that the font lacks
        for name, figure in figures(routing).items():
            check_letters(name, figure)


def check_letters(name: str, figure: Figure) -> None:
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    width, height = figure.bbox.size
    for text in figure.findobj(Text):
        if not text.get_visible() or not text.get_text():
            continue
        box = text.get_window_extent(renderer)
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{name}: {text.get_text()[:40]!r} at {box}"
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [tick.label1 for tick in axis.get_major_ticks() if tick.label1.get_text()]
            boxes = [label.get_window_extent(renderer) for label in ticks if label.get_visible()]
            low = (lambda b: b.x0) if axis is axes.xaxis else (lambda b: b.y0)
            high = (lambda b: b.x1) if axis is axes.xaxis else (lambda b: b.y1)
            boxes.sort(key=low)
            for one, other in zip(boxes, boxes[1:], strict=False):
                assert high(one) <= low(other) + 1, f"{name}: tick labels meet at {one}"


def named(routing: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the routing with `name` where a user can put any letters."""
    tasks = {f"{key} {name}": entry for key, entry in routing["tasks"].items()}
    told = routing["task_distance"] and routing["task_distance"] | {"tasks": list(tasks)}
    compare = routing["compare"] and routing["compare"] | {"run": name}
    changed = {"tasks": tasks, "task_distance": told, "compare": compare, "run": name}
    return routing | changed | {"model": name, "text": None}


def test_captions_say_what_was_counted() -> None:
    routing = whole(12)
    local = routing | {"run": "/home/me/outputs/mine", "model": "/m/tiny"}
    for name in DRAWERS.keys() - {"routing-tasks", "routing-distance"}:
        figure = drawn(name, local)
        assert "mine · tiny · moc, rank 16, top 1, alpha 0.95" in words(figure)
        assert "/home" not in words(figure)
        assert "Controls of step 200." in " ".join(words(figure).split())
    text = " ".join(words(drawn("routing-map", routing)).split())
    assert "40 decisions a block (one per row) on openbookqa, boolq: test split" in text
    assert "at most 20 rows of each task" in text
    text = words(drawn("routing-map", routing | {"text": "Hello.", "level": "token"}))
    assert "40 decisions a block (one per token) on one text" in text.replace("\n", " ")


# ---- the page


def data_in(page: str) -> Any:
    """Return the routing that a page holds, read as a browser would find it."""
    text = re.search(r'<script id="routing"[^>]*>(.*?)</script', page, re.DOTALL)
    assert text is not None
    return json.loads(text[1])


def test_the_page_holds_the_whole_routing() -> None:
    routing = whole(24, 3, 2)
    assert data_in(html.page(routing)) == routing


def test_the_page_loads_nothing() -> None:
    page = html.page(whole(12))
    assert "://" not in page
    assert not re.search(r"<(link|img|iframe|object|embed)\b|\bsrc=|\bhref=|@import|url\(", page)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert policy[1].startswith("default-src &#x27;none&#x27;;")
    assert "unsafe" not in policy[1]


def test_names_cannot_leave_their_place_in_the_page() -> None:
    routing = named(whole(12), NASTY + "{{script}} <!-- ]]>")
    routing["warnings"] = [{"name": "one_token", "message": NASTY, "key": "</code>"}]
    page = html.page(routing)
    plain = html.page(whole(12))
    assert data_in(page) == routing
    for tag in ("<script", "</script", "<b>", "<!--", "class Heat"):
        assert page.count(tag) == plain.count(tag), tag


def test_numbers_that_json_cannot_spell_become_null() -> None:
    routing = routing_of(12, TASKS[:1])
    routing["per_site"][3]["relative_size"] = float("nan")
    assert data_in(html.page(routing))["per_site"][3]["relative_size"] is None


@pytest.fixture
def chromium() -> None:
    if EXECUTABLE is None:
        absent("no Chromium on this machine; Debian's package is called chromium")


in_a_browser = pytest.mark.usefixtures("chromium")
TIP = "document.querySelector('#map .tip').innerText.split('\\n').join(' ')"
PLACE = """(() => { const box = document.querySelector('#map canvas').getBoundingClientRect();
  return [box.x + map.left, box.y, map.wide, map.tall]; })()"""


@in_a_browser
def test_pointing_at_a_cell_tells_its_values(tmp_path: Path) -> None:
    routing = whole(24, 3, 2)
    path = tmp_path / "routing.html"
    path.write_text(html.page(routing))
    row, column = 5, int(np.argmax(routing["share"][5]))
    with Browser(tmp_path / "profile") as browser:
        browser.open(path)
        x, y, wide, tall = browser.ask(PLACE)
        browser.hover(x + (column + 0.5) * wide, y + (row + 0.5) * tall)
        told = browser.ask(TIP)
        assert f"2.ffn → {routing['sites'][column]['name']}" in told
        assert f"share {100 * routing['share'][row][column]:.1f} %" in told
        assert f"chosen {routing['counts'][row][column]} times" in told
        probability = float(f"{routing['probability'][row][column]:.3g}")
        assert f"probability {probability}" in told
        assert browser.complaints() == []
        assert browser.requests() == [path.as_uri()]


@in_a_browser
def test_keys_and_the_task_change_what_is_told(tmp_path: Path) -> None:
    routing = whole(24, 1, 2)
    path = tmp_path / "routing.html"
    path.write_text(html.page(routing))
    with Browser(tmp_path / "profile") as browser:
        browser.open(path, fragment="#task=boolq&measure=weight&cell=3.4")
        entry = routing["tasks"]["boolq"]
        assert f"1.ffn → 2.attn share {100 * entry['share'][3][4]:.1f} %" in browser.ask(TIP)
        browser.ask("document.querySelector('#map canvas').focus()")
        for key in ("ArrowRight", "ArrowDown"):
            browser.press(key)
        assert f"2.attn → 2.ffn share {100 * entry['share'][4][5]:.1f} %" in browser.ask(TIP)
        browser.press("Enter")
        assert browser.ask("location.hash") == "#task=boolq&measure=weight&cell=4.5"
        browser.press("Escape")
        assert browser.ask("document.querySelector('#map .tip').hidden")
        assert browser.complaints() == []


@in_a_browser
@pytest.mark.parametrize("width", [360, 1200])
def test_nasty_names_stay_text_and_fit(width: int, tmp_path: Path) -> None:
    routing = named(whole(12), NASTY)
    routing["warnings"] = [{"name": "one_token", "message": NASTY, "key": "</code>"}]
    path = tmp_path / "routing.html"
    path.write_text(html.page(routing))
    with Browser(tmp_path / "profile") as browser:
        browser.open(path, width=width)
        assert browser.ask("document.querySelectorAll('b').length") == 0
        assert "</script><b>" in browser.ask("document.querySelector('.warning').textContent")
        assert browser.ask("document.documentElement.scrollWidth") <= width
        assert browser.complaints() == []


@in_a_browser
def test_a_text_shows_each_token_and_its_vote(tmp_path: Path) -> None:
    routing = routing_of(12, TASKS[:1], history=[], text="Water <b>boils") | {"tasks": {}}
    routing["tokens"] = {
        "tokens": ["Water", " <b>", "boils"],
        "votes": [[1, 2, 2]] * 11 + [[5, 4, 3]],
        "probability": [[0.25, 0.5, 0.125]] * 12,
        "choice": [[2]] * 11 + [[4]],
        "margin": [0.0625] * 12,
    }
    path = tmp_path / "routing.html"
    path.write_text(html.page(routing))
    with Browser(tmp_path / "profile") as browser:
        browser.open(path)
        read = (
            "[...document.querySelectorAll('.tokens li')].map(li => [li.className, li.innerText])"
        )
        assert browser.ask(read) == [
            ["", "Water\n0.ffn\n25.0 %"],
            ["agreed", " <b>\n1.attn\n50.0 %"],
            ["agreed", "boils\n1.attn\n12.5 %"],
        ]
        browser.ask(
            "const pick = document.querySelector('#tokens select'); pick.value = 11; "
            "pick.dispatchEvent(new Event('change'))"
        )
        told = browser.ask("document.querySelector('#tokens p').innerText")
        assert told.startswith("Chosen: 2.attn, by 0.0625 of probability. 1 of 3 tokens")
        assert [entry[0] for entry in browser.ask(read)] == ["", "agreed", ""]
        assert browser.complaints() == []


@in_a_browser
def test_the_page_without_charts_is_whole(tmp_path: Path) -> None:
    """No history, one task, no comparison: the sections go, the tables stay."""
    routing = routing_of(12, TASKS[:1], history=[])
    path = tmp_path / "routing.html"
    path.write_text(html.page(routing))
    with Browser(tmp_path / "profile") as browser:
        browser.open(path)
        shown = "[...document.querySelectorAll('main > section:not([hidden]) h2')].map(h => h.id)"
        assert browser.ask(shown) == ["map-title", "summary-title", "sites-title", "controls-title"]
        assert browser.ask("document.querySelectorAll('#sites tbody tr').length") == 12
        browser.dark()
        assert browser.ask("darkness.matches")
        assert browser.complaints() == []
