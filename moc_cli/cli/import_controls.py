"""`moc import CONTROLS RECIPE`: controls that were trained elsewhere become a run."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from moc_cli.cli.options import (
    JsonOption,
    OverwriteOption,
    RecipeArgument,
    RunFolderOption,
    SetOption,
    TrustOption,
    program,
    repeated,
)


def import_controls(
    controls: Annotated[
        Path,
        typer.Argument(
            metavar="CONTROLS",
            help="A folder that controls.save, the Trainer or peft wrote.",
        ),
    ],
    recipe: RecipeArgument,
    set_: SetOption = None,
    output_dir: RunFolderOption = None,
    overwrite: OverwriteOption = False,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Make a run of controls that were trained from Python, so that all commands take them.

    The recipe names the base model and the rows; its method is replaced by that of the controls.
    """
    from moc_cli.recipe.load import check_trust, load_recipe
    from moc_cli.recipe.reader import as_text

    changes = list(set_ or [])
    folder = [] if output_dir is None else [f"output.output_dir={as_text(str(output_dir))}"]
    loaded = load_recipe(recipe, [*changes, *folder])
    check_trust(loaded, recipe, granted=trust_remote_code)
    from moc_cli.cli.try_next import show_next, use_commands
    from moc_cli.report.output import print_json, say
    from moc_cli.runs import Call
    from moc_cli.training.take_in import take_in

    command = [program(), "import", str(controls), recipe, *repeated("--set", changes)]
    call = Call(shlex.join(command), None if output_dir is None else str(output_dir))
    run = take_in(loaded, controls, call=call, overwrite=overwrite)
    written_recipe = run.read_recipe(trust_remote_code=True)
    if json:
        print_json({"run": run.path, "method": written_recipe.method.model_dump(mode="json")})
        return
    say(f"Written: {run.path}, method {written_recipe.method.name} of the controls")
    show_next(use_commands(str(run.path), written_recipe))
