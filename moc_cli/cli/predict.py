"""`moc predict RUN --file FILE`: the classes of new rows, or the values of a regression."""

from pathlib import Path
from typing import Annotated

import typer

from moc_cli.cli.options import (
    AllowChangedBaseOption,
    BasePathOption,
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    LoadIn4bitOption,
    RunArgument,
    TrustOption,
)


def predict(
    run: RunArgument,
    file: Annotated[
        Path,
        typer.Option(
            "--file",
            metavar="FILE",
            help="New rows: .csv, .tsv, .jsonl, .json or .parquet, with the columns of the "
            "training; labels are not needed.",
        ),
    ],
    output_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the rows with their predictions to this .csv or .jsonl; default: print "
            "them as JSON lines.",
        ),
    ] = None,
    batch_size: BatchSizeOption = None,
    base_path: BasePathOption = None,
    allow_changed_base: AllowChangedBaseOption = False,
    load_in_4bit: LoadIn4bitOption = None,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Classify new rows with a trained classifier: each row's class and all probabilities."""
    from moc_cli.report.output import print_json, say
    from moc_cli.runs import BaseOptions
    from moc_cli.serving.predict import PredictOptions, json_line
    from moc_cli.serving.predict import predict as classify_rows

    options = PredictOptions(
        run=run,
        file=file,
        output_file=output_file,
        batch_size=batch_size,
        device=device,
        base_options=BaseOptions(base_path, allow_changed_base, load_in_4bit),
        trust_remote_code=trust_remote_code,
    )
    recipe = options.read_recipe()
    rows = options.read_rows(recipe)
    answer = classify_rows(options, recipe, rows)
    if json:
        print_json(answer)
        return
    for row in answer.get("predictions", ()):
        typer.echo(json_line(row))
    if output_file is not None:
        say(f"{answer['rows']} rows: {output_file}")
