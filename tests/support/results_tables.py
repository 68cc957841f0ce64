"""The tables and pictures of recipes/RESULTS.md, from the small files of runs in recipes/results.

Written again by `PYTHONPATH=tests:. python -m support.results_tables`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from support.machine import ROOT

from moc_cli.cli.sweep import change_sweep, read_evaluations
from moc_cli.recipe.sweep import read_sweep
from moc_cli.report.sweep_tables import sweep_tables
from moc_cli.report.tables import FittedTable
from moc_cli.sweep.figure import draw_sweep
from moc_cli.sweep.plan import make_plan
from moc_cli.sweep.summary import summarize_sweep

DOCUMENT = ROOT / "recipes" / "RESULTS.md"
BLOCK = re.compile(
    r"(<!-- sweep: ([\w-]+)((?:, \w+: [\w.-]+)*) -->\n).*?(<!-- end of sweep -->\n)", re.S
)


@cache
def summarized(name: str, options: str = "") -> dict[str, Any]:
    """Return what `moc sweep --json` prints of a shipped sweep's kept runs.

    `options` are of the command, as `, reference: moc` or `, choose: KEY, choose_seeds: 5`.
    """
    changes: dict[str, Any] = dict(option.split(": ") for option in options.split(", ")[1:])
    if "choose_seeds" in changes:
        changes["choose_seeds"] = int(changes["choose_seeds"])
    sweep = change_sweep(read_sweep(name), **changes)
    plan = make_plan(sweep, [], read_evaluations(sweep))
    plan.find_finished()
    return summarize_sweep(plan)


def tables(name: str, options: str) -> str:
    """Return the Markdown of a shipped sweep's results: conditions, picture, then its tables.

    With options: the tables alone, with another reference that of the differences.
    """
    summary = summarized(name, options)
    if options:
        shown = sweep_tables(summary)[-1 if "reference" in options else 0 :]
        return "\n".join(["", *_markdown(shown)]) + "\n"
    picture = f"![Differences to {summary['reference']}](results/{name}.svg)\n"
    lines = ["", *_conditions(summary), picture, *_markdown(sweep_tables(summary))]
    return "\n".join(lines) + "\n"


def draw(name: str) -> bytes:
    """Return the picture of a sweep's kept runs, as SVG."""
    return draw_sweep(summarized(name))["sweep.svg"]


def picture_file(name: str) -> Path:
    """Return the place of a sweep's picture."""
    return DOCUMENT.parent / "results" / f"{name}.svg"


def document(text: str) -> str:
    """Return RESULTS.md with every block written again."""
    return BLOCK.sub(lambda block: block[1] + tables(block[2], block[3]) + block[4], text)


def _conditions(summary: Mapping[str, Any]) -> Iterator[str]:
    conditions = summary["conditions"]
    yield f"- `moc sweep {summary['sweep']}`: {summary['finished']} of {summary['needed']} runs"
    yield f"- Trained on: {'; '.join(conditions['device'])}; {'; '.join(conditions['versions'])}"
    yield f"- Commits: {', '.join(commit[:7] for commit in conditions['commit'])}"
    yield ""


def _markdown(tables: Iterable[FittedTable]) -> Iterator[str]:
    for table in tables:
        yield f"**{table.title}**\n"
        yield from _lines(table)
        yield ""


def _lines(table: FittedTable) -> Iterator[str]:
    yield _line(list(table.head))
    yield _line(["---"] * len(table.head))
    for row in table.rows:
        cells = []
        for cell in row:
            bold = not isinstance(cell, str) and "bold" in str(cell.style) and cell.plain
            cells.append(f"**{cell}**" if bold else str(cell))
        yield _line(cells)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def main() -> None:
    """Write the tables into RESULTS.md, and the pictures beside the runs."""
    text = DOCUMENT.read_text(encoding="utf-8")
    for _, name, options, _ in BLOCK.findall(text):
        if not options:
            picture_file(name).write_bytes(draw(name))
    DOCUMENT.write_text(document(text), encoding="utf-8")


if __name__ == "__main__":
    main()
