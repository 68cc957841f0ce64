"""What `moc export` shows: the files with their sizes, and how their logits compared."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text


def export_table(folder: str, sizes: Mapping[str, int]) -> Table:
    """Return the files of an export and their sizes."""
    table = Table(box=box.SIMPLE_HEAD, title=Text(folder), title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in sizes.items():
        table.add_row(Text(name), in_bytes(size))
    table.add_section()
    table.add_row("together", in_bytes(sum(sizes.values())))
    return table


def in_bytes(size: int) -> str:
    """Return a number of bytes as people read it."""
    value, units = float(size), ["B", "kB", "MB", "GB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def parity_sentence(parity: Mapping[str, Any]) -> str:
    """Return one sentence on the logits that a fresh process got."""
    if "max_difference" not in parity:
        return "read back by a fresh process"
    told = (
        "equal to the bit"
        if parity["bit_equal"]
        else f"within {parity['max_difference']:.3g} ({parity['relative_difference']:.2g} of the "
        f"largest; {parity['tolerance']:g} of it allowed)"
    )
    text = f"read back by a fresh process: logits of {parity['positions']} positions {told}"
    rounding = parity.get("rounding")
    if rounding:
        text += (
            f" to the run rounded alike; rounding moved a logit by up to "
            f"{rounding['max_difference']:.3g} ({rounding['relative_difference']:.2g} of the "
            f"largest), {100 * rounding['same_best']:.1f} % keep their best"
        )
    return text
