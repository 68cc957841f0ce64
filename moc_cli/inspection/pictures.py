"""From the dict of routing.json to files: PNG and SVG pictures and one page, routing.html."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moc_cli.errors import FileError
from moc_cli.files import write_bytes_atomic, write_text_atomic
from moc_cli.inspection import html, maps, pictures_charts
from moc_cli.inspection.pictures_style import settle, style, to_png, to_svg

DRAWERS = {
    "routing-map": maps.site_map,
    "routing-cross": maps.cross_types,
    "routing-layers": maps.layer_maps,
    "routing-tasks": maps.tasks,
    "routing-history": pictures_charts.history,
    "routing-distance": pictures_charts.task_distance,
    "routing-compare": pictures_charts.comparison,
    "routing-ablation": pictures_charts.ablation,
}


def draw(routing: dict[str, Any], folder: Path) -> list[Path]:
    """Write every picture that `routing` has data for, and routing.html; return their paths.

    Each picture is written as PNG and SVG; those of an earlier inspection that this one has no
    data for go, as they would show another run's or text's routes. Raises FileError when the disk
    refuses.
    """
    paths = []
    with style():
        for name, figure in figures(routing).items():
            for ending, convert in (("png", to_png), ("svg", to_svg)):
                path = Path(folder, f"{name}.{ending}")
                write_bytes_atomic(path, convert(figure))
                paths.append(path)
    page = Path(folder, "routing.html")
    write_text_atomic(page, html.page(routing))
    for name in DRAWERS:
        for old in (Path(folder, f"{name}.png"), Path(folder, f"{name}.svg")):
            if old not in paths:
                _remove(old)
    return [*paths, page]


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise FileError(f"cannot remove {path}: {error.strerror or error}") from error


def figures(routing: dict[str, Any]) -> dict[str, Figure]:
    """Return the pictures by name, for those that `routing` has data for."""
    with style():
        drawn = {name: drawer(routing) for name, drawer in DRAWERS.items()}
        return {name: settle(figure) for name, figure in drawn.items() if figure is not None}
