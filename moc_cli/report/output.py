"""The two streams: results go to stdout, everything said along the way to stderr."""

import json
import sys
from typing import TYPE_CHECKING, Any

from moc_cli.report.characters import is_plain, printable

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def out() -> "Console":
    """Return the console of results."""
    from moc_cli.report.console import SafeConsole

    return SafeConsole(highlight=False)


def err() -> "Console":
    """Return the console of progress and notes."""
    from moc_cli.report.console import SafeConsole

    return SafeConsole(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print `value` as indented JSON on stdout; dataclasses and paths are understood."""
    from moc_cli.files import to_json

    text = "".join(
        char if char == "\n" or is_plain(char) else json.dumps(char)[1:-1]
        for char in to_json(value)
    )
    sys.stdout.write(text + "\n")


def print_table(*tables: "RenderableType") -> None:
    """Print rich tables on stdout."""
    console = out()
    for table in tables:
        console.print(table)


def say(text: str) -> None:
    """Print a note on stderr, as it is: no markup, no wrapping, no control characters."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()
