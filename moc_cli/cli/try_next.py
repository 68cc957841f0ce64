"""What `moc train` proposes to do next: commands that can be pasted as they are."""

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moc_cli.cli.options import program, repeated

if TYPE_CHECKING:
    from moc_cli.recipe.schema import Recipe

Command = tuple[str, str]  # what to paste, and what it is for

# Keys that mean the same in both methods of a comparison.
_SHARED = {"moc": ("rank", "scale", "sites", "placement")}
_SHARED["control"] = _SHARED["moc"]


def use_commands(run: str, recipe: "Recipe") -> list[Command]:
    """Return the commands that use a finished run.

    `recipe` is the run's own: it holds the format that was found in the rows, where the user's
    leaves it open.
    """

    def command(name: str, *options: str) -> str:
        return shlex.join([program(), name, run, *options])

    commands = [(command("eval"), "score every item, for intervals")]
    if not recipe.data.kind.classifier:
        commands.append((command("generate", "--prompt", "Hello"), "text of the trained model"))
    if getattr(recipe.method, "top_k", 0):
        commands.append((command("inspect-routing"), "which controls the sites choose"))
    folder = f"{run}-controls"
    options = ("--to", "controls", "--output-dir", folder)
    commands.append((command("export", *options), "the controls in a folder of their own"))
    return commands


def comparison_commands(recipe: "Recipe", run: str, train: str) -> list[Command]:
    """Return how to train another method at the same rank, and to compare the two runs.

    `train` is the call of this training without its changes of `method` and its run folder.
    """
    method = recipe.method
    other_method = "control" if method.name == "moc" else "moc"
    defaults = type(method).model_fields
    values = method.model_dump(mode="json")
    changes = [f"method={other_method}"]
    for key in _SHARED.get(method.name, ("rank",)):
        if key == "rank" or values[key] != defaults[key].default:
            changes.append(f"method.{key}={json.dumps(values[key])}")
    other_run = f"{run}-{other_method}"
    options = shlex.join([*repeated("--set", changes), "--output-dir", other_run])
    return [
        (f"{train} {options}", f"method {other_method}"),
        (shlex.join([program(), "compare", run, other_run]), "then: the two runs side by side"),
    ]


def seeds_commands(runs: Sequence[str]) -> list[Command]:
    """Return how to compare the runs of several seeds."""
    if len(runs) < 2:
        return []
    return [(shlex.join([program(), "compare", *runs]), "the seeds side by side")]


def show_next(commands: list[Command]) -> None:
    """Print the commands with their purposes."""
    from moc_cli.report.output import say

    lines = [f"  {command}   # {purpose}" for command, purpose in commands]
    say("\n".join(["\nTry next:", *lines]))
