"""The files of `moc inspect-routing`: routing.json, the figures as PNG and SVG, routing.html."""

import json
from pathlib import Path
from typing import Any

from moc_cli.errors import FileError
from moc_cli.files import to_plain, write_bytes_atomic, write_text_atomic
from moc_cli.inspection.figures import FIGURES, draw_figures
from moc_cli.inspection.page import build_page
from moc_cli.report.figure_style import figure_style
from moc_cli.run_files import RoutingJson, check_own

RECORD, PAGE = "routing.json", "routing.html"


def check_routing_folder(folder: Path) -> None:
    """Raise FileError where `write_results` would replace or remove files of others."""
    pictures = [f"{name}.{ending}" for name in FIGURES for ending in ("png", "svg")]
    check_own(folder, RECORD, RoutingJson, [PAGE, *pictures], command="moc inspect-routing")


def write_results(routing: dict[str, Any], folder: Path) -> list[Path]:
    """Write routing.json on few lines, and what is drawn from it; return the paths.

    Raises FileError when the disk refuses.
    """
    path = folder / RECORD
    lines = [
        f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
        for key, value in to_plain(routing).items()
    ]
    write_text_atomic(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return [path, *write_figures(routing, folder)]


def write_figures(routing: dict[str, Any], folder: Path) -> list[Path]:
    """Write every figure that `routing` has data for, and routing.html; return their paths.

    Figures of an earlier inspection that this one has no data for are removed, as they would show
    another run's or text's routes. Raises FileError when the disk refuses.
    """
    paths = []
    figures = {}
    with figure_style():
        for name, frame in draw_figures(routing).items():
            figures[name] = (frame, frame.save("svg"))
            for ending, content in (("png", frame.save("png")), ("svg", figures[name][1])):
                paths.append(folder / f"{name}.{ending}")
                write_bytes_atomic(paths[-1], content)
    page = folder / PAGE
    write_text_atomic(page, build_page(routing, figures))
    for name in FIGURES.keys() - figures.keys():
        for old in (folder / f"{name}.png", folder / f"{name}.svg"):
            try:
                old.unlink(missing_ok=True)
            except OSError as error:
                raise FileError(f"cannot remove {old}: {error.strerror or error}") from error
    return [*paths, page]
