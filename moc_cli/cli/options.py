"""What several commands share: options, and how to start the program again."""

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, as in train.max_steps=50; may be repeated.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")
]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a recipe that comes with the program."
    ),
]


def program() -> str:
    """How the user can start this program again: `moc`, or its path where it is not on PATH."""
    typed = Path(sys.argv[0])
    if typed.name != "moc":
        return "moc"
    found = shutil.which("moc")
    return "moc" if found and Path(found).resolve() == typed.resolve() else str(typed)
