"""The figures of `moc inspect-routing`: what is drawn is what was recorded."""

import copy
import functools
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text
from support.routing import NASTY, TASKS, ablated, full_routing, named, routing_of

from moc_cli.inspection.figure_parts import (
    FEW,
    SMALLEST,
    Sites,
    control_by_layer,
    share_colours,
    step_edges,
)
from moc_cli.inspection.figures import FIGURES, draw_figures, site_map
from moc_cli.inspection.page import build_page
from moc_cli.inspection.results import write_figures
from moc_cli.report.figure_style import DPI, FigureFrame, figure_style

SHAPES = [(FEW, 1, 2), (64, 7, 8)]  # sites (the most whose names are ticks), top_k, tasks
Figures = Callable[[int, int, int], dict[str, FigureFrame]]
ALWAYS = {"routing-map", "routing-cross", "routing-layers"}


def framed(name: str, routing: dict[str, Any]) -> FigureFrame:
    """Return one figure as it is before it is laid out."""
    with figure_style():
        frame = FIGURES[name](routing)
    assert frame is not None
    return frame


def drawn(name: str, routing: dict[str, Any]) -> Figure:
    return framed(name, routing).figure


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


@pytest.fixture(scope="module")
def figures() -> Callable[[int, int, int], dict[str, FigureFrame]]:
    """`figures(*shape)`: all figures of a routing with difficult names, laid out once."""

    @functools.cache
    def lay_out(sites: int, top_k: int, tasks: int) -> dict[str, FigureFrame]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # also a letter that the font lacks
            return draw_figures(named(full_routing(sites, top_k, tasks), NASTY))

    return lay_out


def test_the_largest_pictures_are_as_wide_and_small_files(figures: Figures) -> None:
    """Most bytes of the page are of the two figures with a value for every pair of sites."""
    laid_out = figures(*SHAPES[1])
    for frame in laid_out.values():
        width, height = frame.figure.get_size_inches()
        assert width == 6
        assert height * DPI["png"] < 2800
    routing = full_routing(*SHAPES[1])
    plain = framed("routing-map", routing).settle()
    maps = {"routing-map": plain, "routing-tasks": laid_out["routing-tasks"]}
    with figure_style():
        saved = {name: (frame, frame.save("svg")) for name, frame in maps.items()}
    assert len(saved["routing-map"][1]) < 200_000
    assert len(build_page(routing, saved).encode()) < 5_880_000


def test_pictures_that_have_no_data_are_left_out() -> None:
    routing = routing_of(6, TASKS[:1])
    for name, draw_figure in FIGURES.items():
        with figure_style():
            assert (draw_figure(routing | {"history": []}) is not None) == (name in ALWAYS)


def test_pictures_of_an_earlier_inspection_do_not_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: FIGURES[name] for name in ("routing-layers", "routing-ablation")}
    for module in ("figures", "results"):  # the other figures would take seconds
        monkeypatch.setattr(f"moc_cli.inspection.{module}.FIGURES", few)
    monkeypatch.setattr(FigureFrame, "save", lambda frame, kind: b'<svg viewBox="0 0 1 1"/>')
    routing = routing_of(12, TASKS[:1])
    (tmp_path / "mine.png").write_bytes(b"kept")
    write_figures(routing | {"ablation": ablated(routing)}, tmp_path)
    assert (tmp_path / "routing-ablation.png").is_file()
    paths = write_figures(routing, tmp_path)
    assert set(tmp_path.iterdir()) == {*paths, tmp_path / "mine.png"}
    assert len(paths) == 3


def test_the_same_routing_gives_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the user's matplotlibrc, the clock or the object's ids are."""
    routing = full_routing(6)

    def files() -> list[bytes]:
        with figure_style():
            names = ("routing-layers", "routing-compare")
            frames = [framed(name, copy.deepcopy(routing)).settle() for name in names]
            return [frame.save(kind) for frame in frames for kind in ("png", "svg")]

    first = files()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20)
    monkeypatch.setitem(matplotlib.rcParams, "svg.hashsalt", None)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    assert files() == first
    assert matplotlib.rcParams["font.size"] == 20


def test_a_figure_is_drawn_once_for_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = framed("routing-distance", full_routing(4)).settle()
    draw_figure, drawings = Figure.draw, []
    monkeypatch.setattr(
        Figure, "draw", lambda *given: (drawings.append(given), draw_figure(*given))
    )
    with figure_style():
        frame.save("svg")
    assert len(drawings) == 1


def test_the_map_shows_every_share() -> None:
    routing = routing_of(60, TASKS[:2])
    (mesh,) = meshes(drawn("routing-map", routing))
    np.testing.assert_array_equal(values(mesh), np.array(routing["share"]))


def test_small_maps_have_their_numbers() -> None:
    routing = routing_of(6, TASKS[:1])
    shown = words(drawn("routing-map", routing)).split()
    assert {f"{100 * share:.0f}" for row in routing["share"] for share in row if share} <= {*shown}
    assert len(drawn("routing-map", routing_of(24, TASKS[:1])).axes[1].texts) == 0


def test_a_run_named_as_its_method_has_its_parents_name_too() -> None:
    routing = full_routing(6) | {"run": "/home/me/runs/glue/minilm/moc", "model": "org/MiniLM"}
    assert "minilm/moc · org/MiniLM · moc, rank 16" in words(drawn("routing-map", routing))


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
    """Layer × control k, by the plain loop over the recorded shares."""
    routing = routing_of(24, TASKS[:2])
    figure = drawn("routing-layers", routing)
    for mesh, first in zip(meshes(figure), (0, 1), strict=True):
        for k, layer in np.ndindex(12, 12):
            control = 2 * k + first
            both = [routing["share"][2 * layer + block][control] for block in (0, 1)]
            assert values(mesh)[layer, k] == pytest.approx(sum(both) / 2)


def test_a_layer_without_one_block_type_is_averaged_over_what_it_has() -> None:
    routing = routing_of(6, TASKS[:1])
    for key in ("share", "counts"):
        routing[key] = [row[:5] for row in routing[key][:5]]
    routing["sites"] = routing["sites"][:5]  # layer 2 has no FFN site
    part = control_by_layer(Sites.of(routing), routing, "attn")
    assert part[2, 1] == routing["share"][4][2]
    split = [site | {"pool": site["block"]} for site in routing["sites"]]
    part = control_by_layer(Sites.of(routing | {"sites": split}), routing, "ffn")
    assert part[1, 0] == routing["share"][3][1]  # its attention block cannot choose it
    assert np.isnan(part[2]).all()


def test_every_task_has_its_panel_on_one_scale() -> None:
    routing = routing_of(12, TASKS)
    figure = drawn("routing-tasks", routing)
    maps = meshes(figure)
    for mesh, entry in zip(maps, routing["tasks"].values(), strict=True):
        np.testing.assert_array_equal(values(mesh), np.array(entry["share"]))
    assert len({mesh.norm.vmax for mesh in maps}) == 1
    assert all(name in words(figure) for name in TASKS)


def test_charts_show_their_numbers() -> None:
    routing = full_routing(12)
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
    with figure_style():
        picture = site_map(routing).save("png")
    pixels = matplotlib.image.imread(io.BytesIO(picture))[..., :3]
    dark = np.all(abs(pixels - share_colours()(1.0)[:3]) < 0.005, axis=-1)
    inside = dark[:, : int(pixels.shape[1] * 0.86)]  # left of the colour bar
    ys, xs = np.nonzero(inside)
    side = (np.ptp(xs) + 1, np.ptp(ys) + 1)
    assert inside.sum() == side[0] * side[1]
    assert min(side) >= 8


def test_never_is_another_colour_than_the_smallest_share() -> None:
    mesh = meshes(drawn("routing-map", routing_of(12, TASKS[:1])))[0]
    never, least = (mesh.cmap(mesh.norm(value)) for value in (0.0, 2 * SMALLEST))
    assert max(abs(a - b) for a, b in zip(never, least, strict=True)) > 0.1
    light = [
        0.2126 * r + 0.7152 * g + 0.0722 * b
        for r, g, b, _ in share_colours()(np.linspace(0, 1, 64))
    ]
    assert all(a > b for a, b in zip(light, light[1:], strict=False)), "darker is more"


@pytest.mark.parametrize("shape", SHAPES)
def test_no_letter_leaves_the_picture_and_no_tick_covers_another(
    shape: tuple[int, int, int], figures: Figures
) -> None:
    for name, frame in figures(*shape).items():
        check_letters(name, frame.figure)


def check_letters(name: str, figure: Figure) -> None:
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
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


def test_captions_say_what_was_counted() -> None:
    routing = full_routing(6)
    local = routing | {"run": "/home/me/outputs/mine", "model": "/m/tiny"}
    for name in FIGURES.keys() - {"routing-tasks", "routing-distance"}:
        figure = drawn(name, local)
        assert "mine · tiny · moc, rank 16, top 1, alpha 0.95" in words(figure)
        assert "/home" not in words(figure)
        assert "Controls of step 200." in " ".join(words(figure).split())
    text = " ".join(words(drawn("routing-map", routing)).split())
    assert "40 decisions a site (one per row) on openbookqa, boolq: test split" in text
    assert "at most 20 rows of each task" in text
    text = words(drawn("routing-map", routing | {"text": "Hello.", "level": "token"}))
    assert "40 decisions a site (one per token) on one text" in text.replace("\n", " ")
