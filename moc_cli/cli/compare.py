"""`moc compare RUN RUN …`: scores, costs and loss curves of runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from moc_cli.cli.options import JsonOption, program, split_names, write_record

RECORD = "comparison.json"


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN RUN …", help="Run folders; the others are compared with the first."
        ),
    ],
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks to compare; default: all scored.")
    ] = None,
    scores: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Scores to compare: a folder below RUN/eval, or final (those of the training); "
            "default: the evaluation that all runs have, with the most items.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for comparison.json, loss.png and loss.svg; default: runs/compare/<runs>.",
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Compare runs with the first one: scores, differences with intervals, costs, loss curves.

    Intervals are paired bootstraps over items. They need the items that `moc eval` writes.
    """
    from moc_cli.comparison.compare import compare_runs
    from moc_cli.comparison.curves import PICTURES, draw_curves
    from moc_cli.comparison.runs import read_runs
    from moc_cli.files import check_folder
    from moc_cli.report.output import out, print_json, print_table, say
    from moc_cli.run_files import Compared, check_own

    loaded = read_runs(runs)
    folder = output_dir or Path("runs") / "compare" / _folder_name([run.name for run in loaded])
    check_folder(folder)
    check_own(folder, RECORD, Compared, PICTURES, command="moc compare")
    comparison = compare_runs(loaded, program=program(), tasks=split_names(tasks), label=scores)
    pictures = draw_curves(loaded)
    results = comparison.to_json() | {"pictures": [folder / name for name in pictures]}
    written = write_record(folder / RECORD, results, pictures)
    if json:
        print_json(results)
        return
    from moc_cli.report.comparison_tables import comparison_tables

    print_table(*comparison_tables(results, width=out().width))
    for note in comparison.notes:
        say(f"- {note}")
    if comparison.commands:
        say("For intervals of the differences, score every item of each run:")
        for command in comparison.commands:
            say(f"  {command}")
    elif any(difference.low is not None for difference in comparison.differences):
        say(
            f"- Intervals ({results['resamples']:,} paired resamples) cover the choice of "
            "items, not the seed of the training (moc train --seeds)."
        )
    say(f"Written: {', '.join(map(str, written))}")


def _folder_name(runs: list[str]) -> str:
    """Return a name for the comparison of these runs."""
    names = [name.replace("/", "-") for name in runs]
    joined = "--".join(names)
    return joined if len(joined) <= 100 else f"{names[0][:60]}--and-{len(names) - 1}-others"
