"""`moc eval RUN` and `moc eval --model ID`: score a run, or the bare model that it started from."""

from pathlib import Path
from typing import Annotated

import typer

from moc_cli.cli.options import JsonOption


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="The run folder of `moc train`.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="ID", help="Score this bare model instead: the zero line."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks; default: those of the recipe.")
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="With --model: commonsense (default) or builtin.")
    ] = None,
    path: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder of <task>/<split>.jsonl.gz; default: the hub."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Score only N rows of each task.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rows a batch.")
    ] = None,
    base: Annotated[
        bool, typer.Option("--base", help="Score the base model on the same rows beside it.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where results.json and samples.jsonl go."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score a run, or a bare model, on its benchmark's tasks."""
    from moc_cli.errors import MocError

    if (run is None) == (model is None):
        raise MocError("give a run folder or --model ID, one of them", "moc eval --help")
    from moc_cli.evaluation.session import Plan, Subject, read_tasks
    from moc_cli.evaluation.session import run as score
    from moc_cli.report.output import print_json, print_table
    from moc_cli.report.tables import evaluation_table

    if run is not None:
        from moc_cli.recipe.load import load_recipe
        from moc_cli.runs import RunFolder

        folder = RunFolder.open(run)
        recipe = load_recipe(folder.recipe_file)
        data = recipe.data
        known = data.suite
        names = _names(tasks) or list(data.tasks)
        plan = Plan(
            suite=known,
            tasks=names,
            path=path or data.path,
            protocol="classify" if known == "glue" else "rank",
            limit=limit,
            batch_size=batch_size or recipe.eval.per_device_eval_batch_size,
            max_length=data.max_length,
            base=base,
        )
    else:
        known = suite or "commonsense"
        from moc_cli.recipe.suites import TASKS

        plan = Plan(
            suite=known,
            tasks=_names(tasks) or list(TASKS.get(known, ())),
            path=path,
            protocol="rank",
            limit=limit,
            batch_size=batch_size or 16,
            max_length=256,
        )
    rows = read_tasks(plan)
    label = plan.protocol + ("" if limit is None else f"-limit-{limit}")
    if run is not None:
        from moc_cli.trained import open_run

        opened = open_run(run, device=device)
        facts = {
            "run": opened.name,
            "method": opened.recipe.method.name,
            "model": opened.recipe.model.model_name_or_path,
            "base_weights_sha256": opened.weights_hash,
            "controls_sha256": opened.controls["payload_sha256"],
            "train_on_inputs": opened.recipe.data.train_on_inputs,
        }
        subject = Subject(opened.adapted, opened.tokenizer, facts)
        where = output or run / "eval" / label
    else:
        from moc_cli.trained import open_base

        assert model is not None
        bare = open_base(model, device=device or "auto")
        facts = {
            "run": None,
            "method": "none",
            "model": model,
            "base_weights_sha256": bare.weights_hash,
        }
        subject = Subject(bare.adapted, bare.tokenizer, facts)
        where = output or Path("outputs") / "eval" / model.strip("/").replace("/", "--") / label
    report = score(subject, plan, rows, where, silent=json)
    if json:
        print_json(report.to_json() | {"folder": str(where)})
    else:
        print_table(evaluation_table(report.to_json()))


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]
