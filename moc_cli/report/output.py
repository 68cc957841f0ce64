"""The two streams: results go to stdout, everything said along the way to stderr."""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def out() -> "Console":
    """Return the console of results."""
    from rich.console import Console

    return Console(highlight=False)


def err() -> "Console":
    """Return the console of progress and remarks."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print `value` as indented JSON on stdout; dataclasses and paths are understood."""
    from moc_cli.files import to_json

    sys.stdout.write(to_json(value) + "\n")


def print_table(*tables: "RenderableType") -> None:
    """Print rich tables on stdout."""
    console = out()
    for table in tables:
        console.print(table)


def say(text: str) -> None:
    """Print a remark on stderr, as it is: no markup, no wrapping, no control characters."""
    sys.stderr.write(printable(text) + "\n")
    sys.stderr.flush()


def printable(text: str) -> str:
    """Return `text` with control characters (of a user's file or path) made visible."""
    return "".join(
        char if char == "\n" or char.isprintable() else char.encode("unicode_escape").decode()
        for char in text
    )
