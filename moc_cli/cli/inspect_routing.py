"""`moc inspect-routing RUN`: what the gate of a run does, and on which inputs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moc_cli.cli.options import (
    AllowChangedBaseOption,
    BasePathOption,
    BatchSizeOption,
    DeviceOption,
    JsonOption,
    LoadIn4bitOption,
    NumProcessesOption,
    RunArgument,
    TrustOption,
    split_names,
)

if TYPE_CHECKING:
    from moc_cli.recipe.schema import Recipe


def inspect_routing(
    context: typer.Context,
    run: RunArgument,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks to route; default: the recipe's.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Split of their rows; default: the scored one."),
    ] = None,
    limit: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Use at most N rows of each task, always the same."),
    ] = 100,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="Route this one text instead; shows each token's vote and the choice.",
        ),
    ] = None,
    site: Annotated[
        str | None, typer.Option(metavar="3.ffn", help="With --text: show the votes at this site.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="RUN2", help="Show the differences to another run.")
    ] = None,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="For each site in turn, replace its routed controls by its own control and "
            "measure how much the loss of the answers rises: one pass over the rows for each site.",
        ),
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the files; default: RUN/routing, with --text RUN/routing/text.",
        ),
    ] = None,
    batch_size: BatchSizeOption = None,
    base_path: BasePathOption = None,
    allow_changed_base: AllowChangedBaseOption = False,
    load_in_4bit: LoadIn4bitOption = None,
    device: DeviceOption = None,
    num_processes: NumProcessesOption = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Show what a run's gate does: which control each site chooses, how surely, for which task.

    Writes routing.json, pictures (PNG and SVG) and one page, routing.html.
    """
    from moc_cli.errors import MocError
    from moc_cli.launching.together import run_together
    from moc_cli.processes import check_one_process
    from moc_cli.recipe.launch import launch_of_options

    if site is not None and text is None:
        raise MocError("--site picks a site of --text", "give a text too")
    launch = launch_of_options(num_processes, device)
    if text is not None:
        check_one_process("inspect-routing --text")
        if launch.num_processes != 1:
            raise MocError("--text is one row; leave out --num-processes")
    recipe = _read_recipe(run, trust_remote_code)
    compare_recipe = None if compare is None else _read_recipe(compare, trust_remote_code)
    from moc_cli.files import check_folder
    from moc_cli.runs import BaseOptions, RunFolder

    home = RunFolder.open(run)
    below = home.checkpoint.name if home.checkpoint else ""
    folder = output_dir or home.path / "routing" / below / ("" if text is None else "text")
    check_folder(folder, within=None if output_dir else home.path)
    code = run_together(launch, context.obj, key="--num-processes ")
    if code is not None:
        raise typer.Exit(code)
    from moc_cli.inspection.results import check_routing_folder, write_results
    from moc_cli.inspection.session import InspectOptions, inspect
    from moc_cli.processes import current
    from moc_cli.report.output import out, print_json, print_table, say
    from moc_cli.report.routing import routing_views

    options = InspectOptions(
        run=run,
        recipe=recipe,
        tasks=split_names(tasks),
        split=split,
        limit=limit,
        text=text,
        site=site,
        compare=compare,
        compare_recipe=compare_recipe,
        ablate=ablate,
        batch_size=batch_size,
        device=device,
        base_options=BaseOptions(base_path, allow_changed_base, load_in_4bit),
    )
    check_routing_folder(folder)
    routing = inspect(options)
    if not current().main:
        return
    paths = write_results(routing, folder)
    if json:
        print_json(routing | {"folder": str(folder)})
        return
    console = out()
    colored = console.is_terminal and not console.no_color
    print_table(*routing_views(routing, width=console.width, colored=colored, site=site))
    for warning in routing["warnings"]:
        say(f"Warning: {warning['message']}")
    say(f"{len(paths)} files in {folder}, among them routing.json and routing.html")


def _read_recipe(path: Path, trust_remote_code: bool) -> "Recipe":
    """Return a run's recipe, before torch is imported; MocError where there is nothing to see."""
    from moc_cli.errors import MocError
    from moc_cli.runs import RunFolder

    recipe = RunFolder.open(path).read_recipe(trust_remote_code=trust_remote_code)
    name = recipe.method.name
    if name != "moc":
        reason = {
            "control": "its controls are all local",
            "molex": "it routes between whole layers, not between controls",
        }.get(name, "it has no gate")
        raise MocError(
            f"{path} was trained with method {name}: {reason}, so there is no routing of controls "
            "to inspect",
            "give a run of method moc",
        )
    return recipe
