"""`moc sweep SWEEP`: train every combination of values, and compare the scores."""

import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moc_cli.cli.options import JsonOption, SetOption, program, repeated, write_record

if TYPE_CHECKING:
    from moc_cli.evaluation.options import EvalOptions
    from moc_cli.recipe.sweep import Sweep
    from moc_cli.signals import EndedBySignal
    from moc_cli.sweep.execute import Execution
    from moc_cli.sweep.plan import SweepPlan

SUMMARY = "sweep.json"


def sweep(
    sweep: Annotated[
        str,
        typer.Argument(
            metavar="SWEEP",
            help="A sweep file, or the name of a sweep that comes with the program; with --vary "
            "a recipe.",
        ),
    ],
    set_: SetOption = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=A,B", help="Values to try of a key of the recipe; may be repeated."
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N,M", help="Seeds of every combination; default: the sweep's."),
    ] = None,
    jobs: Annotated[
        str,
        typer.Option(
            metavar="auto|N",
            help="Runs at the same time, each on a GPU of its own; auto: one for each GPU.",
        ),
    ] = "auto",
    choose: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help="What varies and is chosen by the validation rows; default: the sweep's.",
        ),
    ] = None,
    choose_seeds: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Seeds on which each of its values is tried; default: 1."
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="VALUE", help="Value that the others are compared with; default: the sweep's."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of runs and results; default: the sweep's."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every recipe, and list the runs.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Train every combination of values, some seeds each, and set the scores side by side.

    Each run is a `moc train`. Finished runs are not repeated, so that the same command goes on
    where it was stopped.
    """
    from moc_cli.files import check_folder
    from moc_cli.recipe.sweep import read_sweep
    from moc_cli.report.output import say
    from moc_cli.run_files import check_own
    from moc_cli.sweep.plan import make_plan

    definition = change_sweep(
        _of_recipe(sweep, vary) if vary else read_sweep(sweep),
        seeds=seeds,
        choose=choose,
        choose_seeds=choose_seeds,
        reference=reference,
    )
    placed = definition
    if output_dir is not None:
        placed = replace(definition, output_dir=str(output_dir), results_dir=None)
    plan = make_plan(placed, set_ or [], read_evaluations(placed))
    job_limit = _read_jobs(jobs)
    places = [plan.sweep.output_dir, plan.sweep.results_dir]
    folders = [Path(place) for place in places if place]
    for folder in folders:
        check_folder(folder)
    from moc_cli.sweep.execute import Execution

    if definition.results_dir and not plan.sweep.results_dir:
        say(
            f"results stay in {folders[-1]}: {definition.results_dir} is for the sweep as its "
            "file has it, and is left alone"
        )
    plan.find_finished()
    if dry_run:
        _list(plan, job_limit, json)
        return
    from moc_cli.sweep.figure import PICTURES
    from moc_cli.sweep.summary import Swept

    check_own(folders[-1], SUMMARY, Swept, PICTURES, command="moc sweep")
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    resume_command = _resume_command(
        [sweep, *repeated("--set", set_ or []), *repeated("--vary", vary or [])],
        {"--seeds": seeds, "--jobs": jobs, "--choose": choose, "--choose-seeds": choose_seeds}
        | {"--reference": reference, "--output-dir": output_dir},
    )
    gpus = _count_gpus() if any(plan.next_runs()) else 0
    execution = Execution(plan, job_limit or max(1, gpus), gpus, say)
    if plan.finished:
        say(f"{plan.done()} of {plan.total()} runs are finished, in {folders[-1]}")
    stopped = _train(execution, resume_command)
    _show(execution, folders[-1], json)
    if plan.failed:
        say(f"{len(plan.failed)} runs failed; after fixing the cause: {resume_command}")
    if stopped is not None:
        say(f"{stopped.message}\n{stopped.hint}")
        raise typer.Exit(stopped.exit_code)
    if plan.failed:
        raise typer.Exit(2)


def _train(execution: "Execution", resume_command: str) -> "EndedBySignal | None":
    """Train what is not finished, under a progress bar; return the signal that ended it."""
    from moc_cli.report.progress import WorkProgress
    from moc_cli.signals import EndedBySignal

    total, finished = execution.plan.total(), execution.plan.done()
    try:
        with WorkProgress("runs", total - finished, interval=total) as bar:
            execution.run_all(lambda done: bar.observe(done - finished), resume_command)
    except EndedBySignal as stop:
        return stop
    return None


def _list(plan: "SweepPlan", jobs: int | None, json: bool) -> None:
    """Print which runs the sweep needs, and which of them are finished."""
    from moc_cli.report.output import print_json, print_table, say
    from moc_cli.report.sweep_tables import plan_table

    listed = plan.listed()
    if json:
        print_json({"runs": [{"name": name, "finished": done} for name, done in listed]})
        return
    print_table(plan_table(listed))
    job_text = "one per GPU (at least 1)" if jobs is None else str(jobs)
    say(f"{plan.total()} runs are needed, {job_text} at the same time")


def _show(execution: "Execution", folder: Path, json: bool) -> None:
    """Write what is known of all finished runs, and print it."""
    from moc_cli.report.output import print_json, print_table, say
    from moc_cli.report.sweep_tables import sweep_tables
    from moc_cli.sweep.figure import draw_sweep
    from moc_cli.sweep.summary import summarize_sweep

    summary = summarize_sweep(execution.plan)
    files = write_record(folder / SUMMARY, summary, draw_sweep(summary))
    if json:
        print_json(summary)
        return
    print_table(*sweep_tables(summary))
    say(f"Written: {', '.join(map(str, files))}")


def _of_recipe(name: str, vary: list[str]) -> "Sweep":
    """Return the sweep of a recipe and what `--vary` says."""
    from moc_cli.errors import MocError
    from moc_cli.recipe.sweep import Sweep, parse_vary, setting_of

    groups = {}
    for text in vary:
        key, values = parse_vary(text)
        if key in groups:
            raise MocError(f"--vary {key} is given twice", "give all its values at once")
        groups[key] = [setting_of(key, value) for value in values]
    recipe = Path(name).stem if Path(name).suffix else name.replace("/", "-")
    title = "-".join([recipe, *(key.rpartition(".")[2] for key in groups)])
    return Sweep(title, name, groups=groups, output_dir=f"runs/sweeps/{title}")


def change_sweep(
    sweep: "Sweep",
    *,
    seeds: str | None = None,
    choose: str | None = None,
    choose_seeds: int | None = None,
    reference: str | None = None,
) -> "Sweep":
    """Return a sweep with what the options of the command line say; MocError naming all mistakes.

    None leaves what the sweep has.
    """
    from moc_cli.errors import MocError
    from moc_cli.recipe.sweep import check_choice, check_choose_seeds, check_reference

    mistakes = []
    if seeds is not None:
        sweep = replace(sweep, seeds=_read_seeds(seeds))
    if choose is not None:
        if message := check_choice(choose, sweep.groups):
            mistakes.append(f"--choose {choose}: {message}")
        sweep = replace(sweep, chosen_group=choose)
    if choose_seeds is not None:
        sweep = replace(sweep, choose_seeds=choose_seeds)
    if choose_seeds is not None or sweep.choose_seeds > 1:
        count = max(1, len(sweep.seeds))
        if message := check_choose_seeds(sweep.choose_seeds, sweep.chosen_group, count):
            mistakes.append(f"--choose-seeds: {message}")
    if reference is not None:
        sweep = replace(sweep, reference=reference)
    if sweep.reference is not None and not mistakes:
        compared = [values for key, values in sweep.groups.items() if key != sweep.chosen_group]
        names = [setting.name for values in compared for setting in values]
        if message := check_reference(sweep.reference, names):
            mistakes.append(f"--reference {sweep.reference}: {message}")
    if mistakes:
        raise MocError("\n".join(mistakes))
    return sweep


def _read_seeds(text: str) -> tuple[int, ...]:
    """Return the seeds of `--seeds`; MocError where one is none, or is given twice."""
    from moc_cli.errors import MocError
    from moc_cli.recipe.types import LAST_SEED

    texts = [seed.strip() for seed in text.split(",")]
    numbers = tuple(int(seed) for seed in texts if seed.isdecimal() and int(seed) <= LAST_SEED)
    if len(set(numbers)) < len(texts):
        allowed = f"whole numbers from 0 to {LAST_SEED}, each once"
        raise MocError(f"--seeds {text}: allowed: {allowed}", "as --seeds 0,1")
    return numbers


def read_evaluations(sweep: "Sweep") -> "list[EvalOptions]":
    """Return the options of each `moc eval` of a sweep; MocError naming what is wrong with any."""
    from moc_cli.cli.eval import read_options
    from moc_cli.errors import MocError

    options, mistakes = [], []
    for text in sweep.evaluations:
        try:
            options.append(read_options(["RUN", *shlex.split(text)]))
            if options[-1].output_dir is not None:
                mistakes.append(f"eval: {text}: a sweep gives the folder; leave --output-dir out")
        except (ValueError, MocError) as error:
            mistakes.append(f"eval: {text}: {error}")
    if mistakes:
        raise MocError("\n".join(mistakes), "moc eval --help")
    return options


def _read_jobs(text: str) -> int | None:
    """Return how many runs are trained at the same time; None: as many as there are GPUs."""
    from moc_cli.errors import MocError

    if text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise MocError(f"--jobs: found {text!r}; allowed: auto or a whole number")
    return None if text == "auto" else int(text)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _resume_command(command: list[str], options: Mapping[str, object]) -> str:
    """Return the command that goes on."""
    for option, value in options.items():
        if value not in (None, "auto"):
            command += [option, str(value)]
    return shlex.join([program(), "sweep", *command])
