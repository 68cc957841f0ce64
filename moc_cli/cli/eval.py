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
        typer.Option(metavar="float32|bfloat16|float16", help="With --model: type of its weights."),
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
    from moc_cli.evaluation.options import EvalOptions
    from moc_cli.report.output import print_json, print_table, say

    options = EvalOptions(
        run=run,
        model=model,
        tasks=tuple(_names(tasks)),
        suite=suite,
        path=path,
        protocol=protocol,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        base=base,
        output=output,
        harness=None if harness is None else tuple(_names(harness)),
        tasks_path=tasks_path,
        num_fewshot=num_fewshot,
    )
    options.check()
    if options.harness is not None:
        from moc_cli.cli.eval_harness import score_harness

        score_harness(options, json)
        return
    from moc_cli.evaluation.session import evaluate as score
    from moc_cli.report.evaluation_tables import evaluation_table

    results = score(options, silent=json)
    if json:
        print_json(results.to_json() | {"folder": str(results.folder)})
    else:
        print_table(evaluation_table(results.to_json()))
        say(f"every item: {results.samples_file}")


def _names(listed: str | None) -> list[str]:
    """Split names at commas."""
    return [name.strip() for name in (listed or "").split(",") if name.strip()]
