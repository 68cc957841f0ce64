"""The table that all commands show, and those of a training, an export and the recipes.

Tables are made from the plain values that `--json` prints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from moc_cli.report.characters import printable
from moc_cli.report.lines import dropped_rows, taken_lines
from moc_cli.report.numbers import byte_size, hundredths, percent

BARS = " ▏▎▍▌▋▊▉█"
LABEL = 24  # characters that the first column keeps where the others need room
LEFT = {"metric", "its vote", "most by site", "top"}  # columns of names after the first


@dataclass(frozen=True)
class FittedTable:
    """A table that loses no heading, name or number, however narrow the terminal is.

    Where its columns do not fit they stand closer, then the first column wraps at LABEL characters,
    then the table continues below: each part begins with the first column. Other columns wrap only
    at `column_width`. `totals` is the number of last rows that stand below a line.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Text]]
    notes: Sequence[str] = ()
    totals: int = 0
    column_width: int | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        cells = [
            [Text(printable(c)) if isinstance(c, str) else c for c in row] for row in self.rows
        ]
        first, *widths = (
            max(cell_len(line) for text in column for line in [*str(text).splitlines(), ""])
            for column in zip(self.head, *cells, strict=True)
        )
        if self.column_width is not None:
            widths = [min(size, self.column_width) for size in widths]
        gap = 3 if first + sum(widths) + 3 * len(widths) <= width else 1
        first = min(first, max(LABEL, width - sum(widths) - gap * len(widths)))
        first = max(1, min(first, width - gap - max(widths, default=0)))
        parts: list[list[int]] = [[]]
        used = first
        for index, size in enumerate(widths, 1):
            if used + gap + size > width and parts[-1]:
                parts.append([])
                used = first
            parts[-1].append(index)
            used += gap + size
        yield Text(self.title, "bold")
        for part in parts:
            table = _table(gap)
            table.add_column(Text(self.head[0]), max_width=first, overflow="fold")
            for index in part:
                table.add_column(
                    Text(self.head[index]),
                    justify="left" if self.head[index] in LEFT else "right",
                    no_wrap=self.column_width is None,
                    max_width=widths[index - 1],
                    overflow="fold",
                )
            for number, row in enumerate(cells, 1):
                last = number == len(cells) - self.totals
                table.add_row(*(row[index] for index in [0, *part]), end_section=last)
            yield table
        for note in filter(None, self.notes):
            yield Text(note, "dim")
        yield Text()


def memory_table(memory: Mapping[str, Any]) -> FittedTable:
    """Show the bytes of frozen weights, trainables, optimizer, and the peak with what it measures.

    `memory` is that of a training's results.json.
    """
    sizes = {name: memory[name] for name in ("weights", "trainable", "optimizer")}
    sizes[memory["kind"]] = memory["peak"]
    if memory.get("predicted"):
        sizes["planned for it"] = memory["predicted"]
    if memory.get("evaluation_peak"):
        sizes[f"{memory['kind']}, in evaluations"] = memory["evaluation_peak"]
    rows = [[name, byte_size(size)] for name, size in sizes.items()]
    return FittedTable("Memory", ["part", "size"], rows)


def parameter_table(parameters: Mapping[str, Any]) -> FittedTable:
    """Show the numbers of parameters: the method's with their share of the base, heads apart."""
    rows = [
        ["controls and gates", f"{parameters['adapter']:,}", percent(parameters["share"], 3)],
        ["fresh modules", f"{parameters['modules']:,}", ""],
        ["base, frozen", f"{parameters['base']:,}", ""],
    ]
    return FittedTable("Parameters", ["part", "number", "share of base"], rows)


def utilization_tables(summary: Mapping[str, Any], *, width: int = 100) -> list[RenderableType]:
    """Show for each pool the use of its controls as bars, as many columns of them as fit.

    `summary` is the `routing` of a training's results.json.
    """
    tables: list[RenderableType] = []
    for pool, state in summary.get("pools", {}).items():
        names, use, dead = state["controls"], state["use"], state["dead"]
        longest = max((len(name) for name in names), default=0)
        columns = max(1, min((width - 2) // (longest + 17), 4, len(names)))
        rows = -(-len(names) // columns)
        top = max(use, default=0.0) or 1.0
        title = Text(f"Controls of the {pool} pool", "bold")
        local = percent(state["local_share"])
        title.append(f"  {state['decisions']:,} decisions, {local} local, ")
        title.append(f"{len(dead)} of {len(names)} dead", "red" if dead else "")
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        for _ in range(columns):
            table.add_column(no_wrap=True)
            table.add_column(no_wrap=True, width=8)
            table.add_column(no_wrap=True, justify="right", width=6)
        for row in range(rows):
            cells: list[Text] = []
            for index in range(row, len(names), rows):
                style = "red" if names[index] in dead else ""
                cells += [Text(names[index], style), Text(bar(use[index] / top, 8), "cyan")]
                cells += [Text(f"{hundredths(use[index])}%", style)]
            table.add_row(*cells)
        tables.append(Group(title, table, Text()))
    return tables


def bar(share: float, width: int) -> str:
    """Return a bar of at most `width` characters; any share above 0 is visible."""
    eighths = max(round(8 * width * share), 1 if share > 0 else 0)
    full, remainder = divmod(eighths, 8)
    return BARS[8] * full + (BARS[remainder] if remainder else "")


def dry_run_views(
    preview: Mapping[str, Any], *, max_length: int, colored: bool
) -> list[RenderableType]:
    """Show what `moc train --dry-run --json` prints: parameters, rows, and the first row.

    Targets of the loss are green, or in brackets without colours.
    """
    views: list[RenderableType] = [parameter_table(preview)]
    if "row" not in preview:
        return views
    left_out = f"; left out: {dropped_rows(preview['dropped'])}" if preview["dropped"] else ""
    views += [Text(printable(line)) for line in taken_lines(preview["taken"])]
    cut_off, processes = preview["answers_cut_off"], preview["processes"]
    views.append(
        f"{preview['rows']:,} rows to train on, {preview['watched']:,} to validate on, "
        f"{preview['scored']:,} to score; {preview['truncated']:,} of them cut to {max_length} "
        f"tokens{f', {cut_off:,} lose their whole answer' if cut_off else ''}{left_out}; "
        f"{preview['steps']:,} steps{f' of {processes} processes' if processes > 1 else ''}; "
        f"{percent(preview['padding_share'])} padding; an epoch takes "
        f"{preview['positions']['padded']:,} positions padded, {preview['positions']['packed']:,} "
        "packed\n"
    )
    pieces, label = preview["row"]["pieces"], preview["row"]["label"]
    tokens = sum(piece["tokens"] for piece in pieces)
    targets = sum(piece["tokens"] for piece in pieces if piece["target"])
    row = Text("First row", "bold")
    if label is None:
        marking = "in green" if colored else "in ⟦brackets⟧"
        count = f"{targets} of {tokens} tokens are learned, {marking}"
    else:
        count = f"{tokens} tokens, label {label}"
    row.append(f"  {count}\n", "not bold")
    for piece in pieces:
        text = printable(piece["text"])
        if piece["target"] and not colored:
            text = f"⟦{text}⟧"
        row.append(text, "green" if piece["target"] else "dim")
    return [*views, row]


def export_table(folder: str, sizes: Mapping[str, int]) -> FittedTable:
    """Show the files of an export and their sizes in bytes."""
    rows = [[name, byte_size(size)] for name, size in sizes.items()]
    rows.append(["total", byte_size(sum(sizes.values()))])
    return FittedTable(folder, ["file", "size"], rows, totals=1)


def recipe_table(recipes: Sequence[tuple[str, str]], kind: str = "recipe") -> Table:
    """Show the shipped recipes, or sweeps: name and purpose."""
    table = _table(3)
    table.add_column(kind, no_wrap=True)  # a name is there to be copied
    table.add_column("what it does", overflow="fold")
    for name, summary in recipes:
        table.add_row(Text(name), Text(summary))
    return table


def _table(gap: int) -> Table:
    """Return an empty table of the style that all have, with `gap` spaces between its columns."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
