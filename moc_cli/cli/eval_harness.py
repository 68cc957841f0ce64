"""`moc eval RUN --harness A,B`: tasks of lm-evaluation-harness."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moc_cli.cli.eval_plans import (
    Request,
    batch_size,
    check_language_model,
    model_home,
    model_subject,
    refuse,
    run_subject,
)
from moc_cli.errors import MocError

if TYPE_CHECKING:
    from moc_cli.evaluation.harness import HarnessPlan


@dataclass(frozen=True)
class Harness:
    """The options that only the harness has, as they were typed."""

    tasks: str | None
    path: Path | None
    num_fewshot: int | None


def score_harness(
    run: Path | None, request: Request, asked: Harness, output: Path | None, json: bool
) -> None:
    """Read the tasks' rows, load the model, run them, and show. Mistakes are told first."""
    names = _names(request, asked)
    _check_subject(run, request)
    from moc_cli.evaluation.harness import check_installed

    check_installed()
    from moc_cli.evaluation.harness import load_tasks
    from moc_cli.evaluation.harness import run as score
    from moc_cli.files import check_folder
    from moc_cli.report.harness_table import harness_table
    from moc_cli.report.output import print_json, print_table, say

    plan = _plan(names, request, asked)
    if run is not None:
        load, home = partial(run_subject, run, request.device), run / "eval"
    else:
        load, home = partial(model_subject, request), model_home(request.model or "")
    folder = output or home / plan.label
    check_folder(folder)
    tasks = load_tasks(plan)
    report = score(load(), plan, tasks, folder, silent=json)
    if json:
        print_json(report.to_json() | {"folder": str(folder)})
    else:
        print_table(harness_table(report.to_json()))
        say(f"every item: {report.samples_file}")


def _names(request: Request, asked: Harness) -> list[str]:
    """The tasks asked for; raises MocError for options that do not go together."""
    if asked.tasks is None:
        raise MocError("--tasks-path and --num-fewshot go with --harness", "moc eval --help")
    names = [name.strip() for name in asked.tasks.split(",") if name.strip()]
    others = {
        "--tasks": request.tasks,
        "--suite": request.suite,
        "--path": request.path,
        "--protocol": request.protocol,
    }
    wrong = [f"{name}: --harness has its own" for name, value in others.items() if value]
    if not names:
        wrong.append("--harness: no task is named")
    if len(set(names)) < len(names):
        wrong.append("--harness: a task is named twice")
    refuse(wrong)
    return names


def _check_subject(run: Path | None, request: Request) -> None:
    """Refuse a classifier before anything is read."""
    if run is None:
        check_language_model(request.model or "")
        return
    from moc_cli.recipe.load import load_recipe
    from moc_cli.recipe.tasks import is_classifier
    from moc_cli.runs import RunFolder

    data = load_recipe(RunFolder.open(run).recipe_file).data
    if is_classifier(data.suite, data.tasks[0], data.format):
        raise MocError(
            f"--harness asks language models; {run} is a classifier ({', '.join(data.tasks)})",
            f"score it: moc eval {run}",
        )


def _plan(names: list[str], request: Request, asked: Harness) -> "HarnessPlan":
    from moc_cli.evaluation.harness import HarnessPlan

    return HarnessPlan(
        names,
        limit=request.limit,
        num_fewshot=asked.num_fewshot,
        batch_size=batch_size(request.batch_size, "auto"),
        path=asked.path,
        base=request.base,
    )
