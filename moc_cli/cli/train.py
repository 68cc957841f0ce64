"""`moc train RECIPE`: fine-tune, score before and after, and say what to try next."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps as quote
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moc_cli.cli.options import JsonOption, RecipeArgument, SetOption, program

if TYPE_CHECKING:
    from moc_cli.recipe.schema import Recipe
    from moc_cli.runs import Call
    from moc_cli.training.dry_run import Reading
    from moc_cli.training.session import Finished


def train(
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Continue from the newest whole checkpoint, or from this one.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is in the run folder.")
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The run folder, instead of output.output_dir."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train N seeds, the recipe's and the next ones, each into DIR/seed-<n>; report "
            "mean, spread and the median run.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything short of weights; show one row."),
    ] = False,
    json: JsonOption = False,
) -> None:
    """Fine-tune as a recipe says, and score before and after.

    Exit codes: 0 done, 2 something to mend, 130 Ctrl-C and 143 SIGTERM with a checkpoint written.
    """
    from moc_cli.errors import MocError
    from moc_cli.recipe.load import load_recipe

    changes = list(set_ or [])
    folder = [] if output_dir is None else [f"output.output_dir={quote(str(output_dir))}"]
    loaded = load_recipe(recipe, [*changes, *folder])
    if resume is not None and overwrite:
        raise MocError("--resume and --overwrite exclude each other", "give only one of them")
    if seeds is not None and resume not in (None, "auto"):
        raise MocError(
            f"--resume {resume} is one run's checkpoint, and --seeds trains several",
            "use --resume auto, or leave out --seeds",
        )
    if dry_run:
        _show_preview(loaded, json)
        return
    from moc_cli.runs import Call  # not before the recipe is right: a mistake is told soon

    words = [program(), "train", recipe]
    for change in changes:
        words += ["--set", change]
    if seeds is not None:
        words += ["--seeds", str(seeds)]
    call = Call(shlex.join(words), None if output_dir is None else str(output_dir))
    if seeds is None:
        _train(loaded, call, resume, overwrite, json)
    else:
        _train_seeds(loaded, seeds, call, resume is not None, overwrite, json)


def _train(recipe: "Recipe", call: "Call", resume: str | None, overwrite: bool, json: bool) -> None:
    from moc_cli.report.output import print_json, say
    from moc_cli.training.session import Session

    session = Session(recipe, call=call, say=say, silent=json)
    with _telling_stops(json):
        finished = session.run(resume=resume, overwrite=overwrite)
    if json:
        print_json(finished.results)
    else:
        _show(finished, recipe, call)


def _train_seeds(
    recipe: "Recipe", count: int, call: "Call", resume: bool, overwrite: bool, json: bool
) -> None:
    from moc_cli.report.comparison_tables import seeds_table
    from moc_cli.report.output import print_json, print_table, say
    from moc_cli.training.seeds import SUMMARY, train_seeds

    with _telling_stops(json):
        found = train_seeds(
            recipe, count, call=call, say=say, silent=json, resume=resume, overwrite=overwrite
        )
    if json:
        print_json(found)
        return
    print_table(seeds_table(found))
    median = found["median"]
    say(f"The median run by {median['by']} is seed {median['seed']}: {median['path']}")
    say(f"Written: {Path(recipe.output.output_dir) / SUMMARY}")
    say("\nTry next:")
    lines = [f"eval {shlex.quote(median['path'])}   # score every item of the median run"]
    if count > 1:
        runs = shlex.join(one["path"] for one in found["seeds"])
        lines.append(f"compare {runs}   # the seeds side by side")
    for line in lines:
        say(f"  {program()} {line}")


@contextmanager
def _telling_stops(json: bool) -> Iterator[None]:
    """Tell of an interrupted training what was kept and how to go on, and end the command."""
    from moc_cli.report.output import print_json, say
    from moc_cli.training.interrupt import Interrupted

    try:
        yield
    except Interrupted as stop:
        if json:
            print_json({"status": "stopped", "message": stop.message, "hint": stop.hint})
        else:
            say(f"{stop.message}\n{stop.hint}")
        raise typer.Exit(stop.exit_code) from None


def _show(finished: "Finished", recipe: "Recipe", call: "Call") -> None:
    """Print the tables, one line about the run, and the next commands."""
    from moc_cli.report.output import out, print_table, say
    from moc_cli.report.tables import (
        memory_table,
        parameter_table,
        results_table,
        utilization_tables,
    )
    from moc_cli.report.train_lines import summary_line

    width = out().width
    print_table(
        results_table(finished.results["tasks"]),
        parameter_table(finished.counts),
        memory_table(finished.outcome.memory),
        *utilization_tables(finished.results["routing"], width=width),
    )
    say(summary_line(finished.results, finished.folder.path))
    say("\nTry next:")
    folder = finished.folder.path
    other = "control" if recipe.method.name != "control" else "moc"
    for line, meaning in (
        (f"{call.base} --set method={other} --output-dir {folder}-{other}", f"method {other}"),
        (f"{call.base} --set seed=1 --output-dir {folder}-seed1", "another seed"),
        (f"{program()} recipes list", "recipes for other models and tasks"),
    ):
        say(f"  {line}   # {meaning}")


def _show_preview(recipe: "Recipe", json: bool) -> None:
    """Print what a run would do."""
    from moc_cli.report.output import out, print_json, print_table, say
    from moc_cli.report.tables import parameter_table
    from moc_cli.training.dry_run import preview

    found = preview(recipe)
    if json:
        print_json(found.to_json())
        return
    print_table(parameter_table(found.counts))
    if found.published_shape:
        say("The model's shapes are the published ones that come with the program.")
    read = found.reading
    if read is None:
        say(f"Rows and tokenizer are not checked: {found.unread}")
        return
    console = out()
    console.print(
        f"{read.rows:,} rows, {read.truncated:,} of them cut to {recipe.data.max_length} tokens; "
        f"{read.steps:,} steps; {100 * read.padding_share:.1f} % padding\n"
    )
    if read.dropped:
        from moc_cli.report.train_lines import dropped_rows

        console.print(f"Left out: {dropped_rows(read.dropped)}\n")
    console.print(_row(read, colored=console.is_terminal and not console.no_color))


def _row(found: "Reading", colored: bool) -> Any:
    """The first training row: targets of the loss in green, or in brackets without colours."""
    from rich.text import Text

    from moc_cli.report.output import printable

    targets = sum(piece.tokens for piece in found.pieces if piece.target)
    tokens = sum(piece.tokens for piece in found.pieces)
    how = "in green" if colored else "in ⟦brackets⟧"
    text = Text("First row", "bold")
    if found.label is None:
        text.append(f"  {targets} of {tokens} tokens are learned, {how}\n", "not bold")
    else:
        text.append(f"  {tokens} tokens, label {found.label}\n", "not bold")
    for piece in found.pieces:
        shown = printable(piece.text)
        if piece.target and not colored:
            shown = f"⟦{shown}⟧"
        text.append(shown, "green" if piece.target else "dim")
    return text
