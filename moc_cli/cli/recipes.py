"""`moc recipes`: list, show, copy the shipped recipes; print the schema of a recipe file."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from moc_cli.cli.options import JsonOption, program

app = typer.Typer(
    name="recipes",
    help="List, show and copy the recipes that come with the program.",
    no_args_is_help=True,
)

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name of a recipe or a sweep, see `moc recipes list`.")
]


@app.command("list")
def list_recipes(json: JsonOption = False) -> None:
    """List the recipes that come with the program."""
    from moc_cli.recipe.catalog import entries, shipped_sweeps
    from moc_cli.report.output import print_json, print_table

    recipes, sweeps = entries(), shipped_sweeps()
    if json:
        print_json(
            [
                {"name": e.name, "kind": e.kind, "path": e.path, "about": e.summary}
                for e in [*recipes, *sweeps]
            ]
        )
        return
    from moc_cli.report.tables import recipe_table

    print_table(
        recipe_table([(entry.name, entry.summary) for entry in recipes]),
        recipe_table([(entry.name, entry.summary) for entry in sweeps], kind="sweep"),
    )


@app.command()
def show(name: NameArgument, json: JsonOption = False) -> None:
    """Print one recipe or sweep file (with --json: its values, a recipe's with the defaults)."""
    from moc_cli.recipe.catalog import shipped

    entry = shipped(name)
    if not json:
        typer.echo(entry.path.read_text(encoding="utf-8"), nl=False)
        return
    from moc_cli.recipe.load import load_recipe
    from moc_cli.recipe.reader import read_yaml
    from moc_cli.report.output import print_json

    if entry.kind == "sweep":
        print_json(read_yaml(entry.path.read_text(encoding="utf-8")).value)
    else:
        print_json(load_recipe(entry.path).model_dump(mode="json"))


@app.command()
def copy(
    name: NameArgument,
    to: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]", help="Target file or folder; default: a file of that name here."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    json: JsonOption = False,
) -> None:
    """Copy one recipe or sweep to a file of your own."""
    from moc_cli.errors import FileError
    from moc_cli.files import write_text_atomic
    from moc_cli.recipe.catalog import shipped
    from moc_cli.report.output import print_json, say

    entry = shipped(name)
    file_name = f"{entry.name.replace('/', '-')}.yaml"
    target = Path(file_name) if to is None else to / file_name if to.is_dir() else to
    if target.exists() and not force:
        raise FileError(f"{target} exists already", hint="Add --force to overwrite it.")
    write_text_atomic(target, entry.path.read_text(encoding="utf-8"))
    if json:
        print_json({"name": entry.name, "path": target})
    else:
        verb = "sweep" if entry.kind == "sweep" else "train"
        command = shlex.join([program(), verb, str(target)])
        say(f"Copied {entry.name} to {target}. Next: {command}")


@app.command()
def schema(json: JsonOption = False) -> None:
    """Print the JSON schema of a recipe file, for editors (it is JSON with or without --json)."""
    from moc_cli.recipe.reference import json_schema
    from moc_cli.report.output import print_json

    print_json(json_schema())
