"""`moc eval RUN` and `moc eval --model ID`: score a run, or a base model."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moc_cli.cli.options import (
    AllowChangedBaseOption,
    BasePathOption,
    DeviceOption,
    JsonOption,
    LoadIn4bitOption,
    NumProcessesOption,
    OptionalRunArgument,
    TorchCompileOption,
    TrustOption,
    split_names,
)

if TYPE_CHECKING:
    from moc_cli.evaluation.options import EvalOptions

# Parameters that are options of an evaluation as they are.
AS_TYPED = (
    *("run", "model", "suite", "path", "protocol", "limit", "batch_size", "dtype", "device"),
    *("trust_remote_code", "torch_compile", "base", "output_dir", "tasks_path", "num_fewshot"),
)


def evaluate(
    context: typer.Context,
    run: OptionalRunArgument = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Score this base model instead, for reference."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Tasks to score; default: the recipe's or the suite's."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="rank|generate",
            help="Rank the options by likelihood, or generate an answer and find an option in it, "
            "as LLM-Adapters does; default: the recipe's, or rank.",
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="With --model: commonsense or builtin; default: commonsense.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE",
            help="Folder of <task>/<split>.jsonl.gz; default: the hub. Of a custom dataset: other "
            "rows, with results of their own.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Use at most N rows of each task, always the same."),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N",
            help="Rows in a batch; auto: as many as fit in memory; default: the recipe's, or auto. "
            "A batch that does not fit is halved.",
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Tasks of lm-evaluation-harness instead (pip install 'moc-cli\\[harness]'); with "
            "these, --limit uses the first rows.",
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --harness: a folder with your own task files."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="With --harness: solved examples before each question."
        ),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Score the base model on the same rows too.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|bfloat16|float16", help="With --model: type of the weights."),
    ] = None,
    base_path: BasePathOption = None,
    allow_changed_base: AllowChangedBaseOption = False,
    load_in_4bit: LoadIn4bitOption = None,
    torch_compile: TorchCompileOption = None,
    device: DeviceOption = None,
    num_processes: NumProcessesOption = None,
    trust_remote_code: TrustOption = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for results.json and samples.jsonl; default: RUN/eval/<protocol>, or "
            "runs/eval/<model>/<suite>-<protocol>, with the name of other rows and the limit.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score a run, or a base model, on the tasks of its suite.

    Every task is saved as soon as it is scored; after Ctrl-C the same command continues.
    """
    from moc_cli.errors import MocError
    from moc_cli.launching.together import run_together
    from moc_cli.processes import check_one_process
    from moc_cli.recipe.launch import launch_of_options
    from moc_cli.report.output import print_json, print_table, say

    options = _options(context.params)
    options.check()
    launch = launch_of_options(num_processes, device)
    if options.harness is not None:
        check_one_process("eval --harness")
        if launch.num_processes != 1:
            raise MocError(
                "--harness runs in one process, and --num-processes asks for several",
                "leave out --num-processes",
            )
        from moc_cli.cli.eval_harness import score_harness

        score_harness(options, json)
        return
    code = run_together(launch, context.obj, key="--num-processes ")
    if code is not None:
        raise typer.Exit(code)
    from moc_cli.evaluation.session import evaluate as score
    from moc_cli.processes import current
    from moc_cli.report.score_tables import evaluation_table

    results = score(options)
    if not current().main:
        return
    if json:
        print_json(results.to_json() | {"folder": str(results.folder)})
    else:
        print_table(evaluation_table(results.to_json()))
        say(f"every item: {results.samples_file}")


def read_options(arguments: list[str]) -> "EvalOptions":
    """Return the options that `moc eval` reads from these arguments; MocError where it refuses."""
    from moc_cli.errors import MocError

    app = typer.Typer()
    app.command()(evaluate)
    try:
        context = typer.main.get_command(app).make_context("moc eval", arguments)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of typer; see `cli._explain`
            raise
        raise MocError(error.format_message()) from error
    options = _options(context.params)
    options.check()
    return options


def _options(values: Mapping[str, Any]) -> "EvalOptions":
    """Return the options of a call, from its parameters by name."""
    from moc_cli.evaluation.options import EvalOptions
    from moc_cli.runs import BaseOptions

    harness = values["harness"]
    return EvalOptions(
        base_options=BaseOptions(
            *(values[name] for name in ("base_path", "allow_changed_base", "load_in_4bit"))
        ),
        tasks=tuple(split_names(values["tasks"])),
        harness=None if harness is None else tuple(split_names(harness)),
        **{name: values[name] for name in AS_TYPED},
    )
