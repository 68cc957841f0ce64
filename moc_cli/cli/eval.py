"""`moc eval RUN` and `moc eval --model ID`: score a run, or the bare model that it started from."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moc_cli.cli.options import JsonOption
from moc_cli.errors import MocError

if TYPE_CHECKING:
    from moc_cli.cli.eval_plans import Asked, Request

PROTOCOLS = ("rank", "generate")
DTYPES = ("float32", "bfloat16", "float16")


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The run folder of `moc train`.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Score this bare model instead: the zero line."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Tasks; default: those of the recipe, or of the suite."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="rank|generate",
            help="Rank the options by likelihood, or generate an answer and look for an option in "
            "it as LLM-Adapters does; default: the recipe's, or rank.",
        ),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="With --model: commonsense (default) or builtin.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of <task>/<split>.jsonl.gz; default: the hub."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Score only N rows of each task, always the same."),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N",
            help="Rows a batch; auto: what fits in memory. Default: the recipe's, or auto. One "
            "that does not fit is halved.",
        ),
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Tasks of lm-evaluation-harness instead: pip install 'moc-cli\\[harness]'. Their "
            "--limit takes the first rows.",
        ),
    ] = None,
    tasks_path: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --harness: a folder of task files of your own."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, metavar="N", help="With --harness: solved examples before a question."),
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Score the base model on the same rows beside it.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="|".join(DTYPES), help="With --model: type of its weights."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where results.json and samples.jsonl go; default: RUN/eval/<protocol>, or "
            "runs/eval/<model>/<suite>-<protocol>, with the limit.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score a run, or a bare model, on its benchmark's tasks.

    Every task is written down as soon as it is scored; Ctrl-C keeps those.
    """
    from moc_cli.cli.eval_plans import Request, model_asked, run_asked

    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    request = Request(model, names, suite, path, protocol, limit, batch_size, dtype, device, base)
    _check(request, run)
    if harness is not None or tasks_path is not None or num_fewshot is not None:
        from moc_cli.cli.eval_harness import Harness, score_harness

        score_harness(run, request, Harness(harness, tasks_path, num_fewshot), output, json)
        return
    asked = model_asked(request) if run is None else run_asked(run, request)
    _score(asked, output or asked.folder, json)


def _check(request: "Request", run: Path | None) -> None:
    """Refuse what is wrong whatever the run holds; all of it at once."""
    from moc_cli.cli.eval_plans import refuse
    from moc_cli.recipe.suggest import choices

    if (run is None) == (request.model is None):
        raise MocError("give a run folder or --model ID, one of them", "moc eval --help")
    wrong = []
    if run is not None:
        given = {"--suite": request.suite, "--dtype": request.dtype}
        wrong += [f"{name} goes with --model; a run has its own" for name in given if given[name]]
    elif request.base:
        wrong.append("--base goes with a run; with --model the base is all that is scored")
    options: dict[str, tuple[str | None, tuple[str, ...]]] = {
        "--protocol": (request.protocol, PROTOCOLS),
        "--dtype": (request.dtype, DTYPES),
        "--device": (request.device, ("auto", "cpu", "cuda")),
    }
    for name, (value, allowed) in options.items():
        if value is not None and value not in allowed:
            wrong.append(f"{name}: found '{value}'{choices(value, allowed)}")
    size = request.batch_size
    if size not in (None, "auto") and not (size.isdecimal() and int(size) > 0):
        wrong.append(
            f"--batch-size: found '{size}'; allowed: auto, or a whole number of at least 1"
        )
    if len(set(request.tasks)) < len(request.tasks):
        wrong.append("--tasks: a task is named twice")
    refuse(wrong)


def _score(asked: "Asked", folder: Path, json: bool) -> None:
    """Read the rows, load the model, score, and show. What is wrong with rows is told first."""
    from moc_cli.evaluation.session import run
    from moc_cli.files import check_folder
    from moc_cli.report.evaluation_tables import evaluation_table
    from moc_cli.report.output import print_json, print_table, say

    check_folder(folder)
    tasks = asked.plan.read_rows()
    subject = asked.load()
    report = run(subject, asked.plan, tasks, folder, known=asked.known(subject), silent=json)
    if json:
        print_json(report.to_json() | {"folder": str(folder)})
    else:
        print_table(evaluation_table(report.to_json()))
        say(f"every item: {report.samples_file}")
