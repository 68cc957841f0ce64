"""`moc compare RUN RUN …`: scores, costs and loss curves side by side, with what differs."""

from pathlib import Path
from typing import Annotated

import typer

from moc_cli.cli.options import JsonOption, program


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN RUN …", help="Run folders; the first is the base.")
    ],
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks; default: all that were scored.")
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which scores: a folder below RUN/eval, or final (training's own). Default: "
            "the evaluation that all runs have, with the most items.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where comparison.json, loss.png and loss.svg go."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare runs with the first: scores, intervals of the differences, costs, curves.

    Intervals are paired bootstraps over items; run `moc eval` on each run to have its items.
    """
    from moc_cli.comparison.compare import compare as compared
    from moc_cli.comparison.curves import draw_curves
    from moc_cli.comparison.runs import read_runs
    from moc_cli.files import check_folder, write_json_atomic
    from moc_cli.report.output import out, print_json, print_table, say

    read = read_runs(runs)
    where = output or Path("runs") / "compare" / _folder([run.name for run in read])
    check_folder(where)
    found = compared(read, program=program(), tasks=_names(tasks), label=scores)
    pictures = draw_curves(read, where)
    whole = found.to_json() | {"pictures": pictures}
    write_json_atomic(where / "comparison.json", whole)
    if json:
        print_json(whole)
        return
    from moc_cli.report.comparison_tables import comparison_tables

    print_table(*comparison_tables(whole, width=out().width))
    for remark in found.remarks:
        say(f"- {remark}")
    if found.commands:
        say("For intervals of the differences, score every item of each run:")
        for command in found.commands:
            say(f"  {command}")
    elif any(one.low is not None for one in found.differences):
        say(
            f"- Intervals ({whole['resamples']:,} paired resamples) tell how far other items could "
            "move a difference; another seed of training can move it too (moc train --seeds)."
        )
    say(f"Written: {', '.join(map(str, [*pictures, where / 'comparison.json']))}")


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _folder(names: list[str]) -> str:
    """Name a comparison after its runs."""
    plain = [name.replace("/", "-") for name in names]
    whole = "--".join(plain)
    return whole if len(whole) <= 100 else f"{plain[0][:60]}--and-{len(plain) - 1}-others"
