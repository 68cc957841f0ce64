"""`moc export RUN --to FORMAT --output-dir DIR`: write a run for use in other programs."""

from pathlib import Path
from typing import Annotated

import typer

from moc_cli.cli.options import (
    AllowChangedBaseOption,
    BasePathOption,
    DeviceOption,
    JsonOption,
    RunArgument,
    TrustOption,
)
from moc_cli.export import FORMATS


def export(
    run: RunArgument,
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help=", ".join(f"{name} ({format.description})" for name, format in FORMATS.items())
            + ".",
        ),
    ],
    output_dir: Annotated[
        Path,
        typer.Option(metavar="DIR", help="A new folder; it is created only if the check succeeds."),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bfloat16|float16", help="Type of the weights; default: the run's."
        ),
    ] = None,
    calibration: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="With static: rows of each task to count routes on."),
    ] = 64,
    base_path: BasePathOption = None,
    allow_changed_base: AllowChangedBaseOption = False,
    device: DeviceOption = None,
    trust_remote_code: TrustOption = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Also upload the folder to this repository; a new one is private."
        ),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Write a run in another format, and check its logits in a fresh process."""
    from moc_cli.export import FormatOptions, find_dtype

    format_options = FormatOptions(find_dtype(dtype), calibration)
    from moc_cli.export.session import ExportOptions, export_run
    from moc_cli.report.lines import parity_line
    from moc_cli.report.output import print_json, print_table, say
    from moc_cli.report.tables import export_table
    from moc_cli.runs import BaseOptions

    options = ExportOptions(
        run=run,
        to=to,
        output_dir=output_dir,
        format_options=format_options,
        device=device,
        trust_remote_code=trust_remote_code,
        base_options=BaseOptions(base_path, allow_changed_base),
        push_to_hub=push_to_hub,
    )
    outcome = export_run(options, say)
    if json:
        print_json(outcome)
        return
    print_table(export_table(outcome.folder, outcome.sizes))
    say("\n".join([parity_line(outcome.parity), *outcome.notes]))
    if outcome.url:
        say(f"Uploaded to {outcome.url}")
