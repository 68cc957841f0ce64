"""`moc train RECIPE`: fine-tune, score before and after, and name the next commands."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moc_cli.cli.options import (
    AllowChangedBaseOption,
    JsonOption,
    OverwriteOption,
    RecipeArgument,
    RunFolderOption,
    SetOption,
    TrustOption,
    program,
    repeated,
)

TRUST = "model.trust_remote_code"

if TYPE_CHECKING:
    from moc_cli.recipe.schema import Recipe
    from moc_cli.runs import Call


def train(
    context: typer.Context,
    recipe: RecipeArgument,
    set_: SetOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            metavar="auto|PATH",
            help="Continue from the newest complete checkpoint, or from this one.",
        ),
    ] = None,
    base_path: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --resume: where the base model is now, if it moved; its weights are "
            "compared.",
        ),
    ] = None,
    allow_changed_base: AllowChangedBaseOption = False,
    overwrite: OverwriteOption = False,
    output_dir: RunFolderOption = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Train N seeds, from the recipe's seed on, each into DIR/seed-<n>; report mean, "
            "standard deviation and the median run.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Check everything but the weights, and show one row."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Train although the plan does not fit the GPU's memory."),
    ] = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Fine-tune the base model of a recipe, and score it before and after.

    Exit codes: 0 finished, 2 a mistake in the input, 130 Ctrl-C and 143 SIGTERM (a checkpoint is
    written).
    """
    from moc_cli.errors import MocError
    from moc_cli.recipe.load import check_trust, load_recipe
    from moc_cli.recipe.reader import as_text

    changes = list(set_ or [])
    if base_path is not None:
        if resume is None:
            raise MocError(
                "--base-path is for a run that is continued",
                "add --resume auto, or name the base model: --set model.model_name_or_path=DIR",
            )
        changes.append(f"model.model_name_or_path={as_text(str(base_path))}")
    if allow_changed_base and resume is None:
        raise MocError("--allow-changed-base is for a run that is continued", "add --resume auto")
    folder = [] if output_dir is None else [f"output.output_dir={as_text(str(output_dir))}"]
    loaded = load_recipe(recipe, [*changes, *folder])
    typed = any(change.partition("=")[0].strip() == TRUST for change in changes)
    check_trust(loaded, recipe, granted=trust_remote_code or typed)
    if resume is not None and overwrite:
        raise MocError("--resume and --overwrite exclude each other", "give only one of them")
    if seeds is not None and resume not in (None, "auto"):
        raise MocError(
            f"--resume {resume} is the checkpoint of one run, and --seeds trains several",
            "use --resume auto, or leave out --seeds",
        )
    if dry_run:
        _dry_run(loaded, json)
        return
    from moc_cli.launching.together import run_together
    from moc_cli.report.output import say
    from moc_cli.runs import Call

    def command(changes: list[str]) -> str:
        command = [program(), "train", recipe, *repeated("--set", changes)]
        if seeds is not None:
            command += ["--seeds", str(seeds)]
        switches = {"--force": force, "--trust-remote-code": trust_remote_code}
        return shlex.join([*command, *(switch for switch, on in switches.items() if on)])

    call = Call(command(changes), None if output_dir is None else str(output_dir))
    code = run_together(
        loaded.launch,
        context.obj,
        rows=(loaded.train.per_device_train_batch_size, loaded.train.gradient_accumulation_steps),
        progress=lambda: _progress(loaded, call),
    )
    if code is not None:
        raise typer.Exit(code)
    # Imported late: a mistake in the recipe is reported sooner.
    from moc_cli.planning.fit import Forecast
    from moc_cli.training.seeds import train_seeds
    from moc_cli.training.session import Session, TrainOptions

    options = TrainOptions(call, resume, overwrite, allow_changed_base)
    forecast = Forecast(say, force=force)
    with _reporting_stops(json):
        if seeds is None:
            elsewhere = [change for change in changes if not _is_of_method(change)]
            results = Session(loaded, options, say, forecast).run()
            _show(loaded, results, command(elsewhere), json)
        else:
            summary = train_seeds(loaded, seeds, options, say, forecast)
            _show_seeds(loaded, summary, json)


def _progress(recipe: "Recipe", call: "Call") -> tuple[str, str]:
    """Say how far processes came that were killed, and how to continue."""
    from moc_cli.errors import RunError
    from moc_cli.runs import RunFolder

    try:
        steps = [line["step"] for line in RunFolder(recipe.output.output_dir).read_metrics()]
    except RunError:
        steps = []
    reached = f" after step {steps[-1]}" if steps else ""
    return reached, f"continue with: {call.command} --resume auto"


def _is_of_method(change: str) -> bool:
    """Whether a `--set` changes the method: another method may not have the key."""
    return change.partition("=")[0].strip().partition(".")[0] == "method"


def _show(recipe: "Recipe", results: dict[str, Any], train_command: str, json: bool) -> None:
    """Print a run's results; `train_command` is the call of a training of another method."""
    from moc_cli.report.lines import summary_line
    from moc_cli.report.output import out, print_json, print_table, say

    if json:
        print_json(results)
        return
    from moc_cli.cli.try_next import comparison_commands, show_next, use_commands
    from moc_cli.report.score_tables import results_table
    from moc_cli.report.tables import memory_table, parameter_table, utilization_tables
    from moc_cli.runs import RunFolder

    print_table(
        parameter_table(results["parameters"]),
        memory_table(results["memory"]),
        *utilization_tables(results["routing"], width=out().width),
        results_table(results["tasks"]),
    )
    folder = recipe.output.output_dir
    say(summary_line(results, Path(folder)))
    run_recipe = RunFolder(folder).read_recipe(trust_remote_code=True)
    show_next(
        [*use_commands(folder, run_recipe), *comparison_commands(recipe, folder, train_command)]
    )


def _show_seeds(recipe: "Recipe", summary: dict[str, Any], json: bool) -> None:
    from moc_cli.cli.try_next import seeds_commands, show_next, use_commands
    from moc_cli.report.comparison_tables import seeds_table
    from moc_cli.report.output import print_json, print_table, say
    from moc_cli.runs import RunFolder
    from moc_cli.training.seeds import SUMMARY

    if json:
        print_json(summary)
        return
    print_table(seeds_table(summary))
    median = summary["median"]
    say(f"The median run by {median['by']} is seed {median['seed']}: {median['path']}")
    say(f"Written: {Path(recipe.output.output_dir) / SUMMARY}")
    runs = [run["path"] for run in summary["seeds"]]
    run_recipe = RunFolder(median["path"]).read_recipe(trust_remote_code=True)
    show_next([*use_commands(median["path"], run_recipe), *seeds_commands(runs)])


@contextmanager
def _reporting_stops(json: bool) -> Iterator[None]:
    """Say of an interrupted training what was saved and how to continue, and end the command."""
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


def _dry_run(recipe: "Recipe", json: bool) -> None:
    """Print what a run would do."""
    from moc_cli.launching.together import count_processes
    from moc_cli.report.lines import labelled
    from moc_cli.report.output import out, print_json, print_table, say
    from moc_cli.report.tables import dry_run_views
    from moc_cli.training.dry_run import preview

    plan = preview(recipe, count_processes(recipe.launch))
    if json:
        print_json(plan)
        return
    console = out()
    colored = console.is_terminal and not console.no_color
    print_table(*dry_run_views(plan, max_length=recipe.data.max_length, colored=colored))
    for note in plan["notes"]:
        say(labelled("note", note))
    if plan["published_shape"]:
        say("The model's shapes are the published ones that come with the program.")
    if plan["unread"] is not None:
        say(f"Rows and tokenizer are not checked: {plan['unread']}")
