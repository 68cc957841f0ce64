"""What several commands share: arguments, options, and how to start the program again."""

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

RUN = (
    "The run folder that `moc train` wrote, or one of its checkpoints, as "
    "RUN/checkpoints/step-000100; of an interrupted run the newest one is used."
)
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help=RUN)]
OptionalRunArgument = Annotated[Path | None, typer.Argument(metavar="[RUN]", help=RUN)]
RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a recipe that comes with the program."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one value of the recipe, as in train.max_steps=50; may be repeated.",
    ),
]
BatchSizeOption = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Rows in a batch; default: the recipe's.")
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the run that is in the run folder.")
]
RunFolderOption = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The run folder; default: the recipe's.")
]
DeviceOption = Annotated[
    str | None,
    typer.Option(metavar="auto|cpu|cuda", help="Where to compute; default: the run's, or auto."),
]
NumProcessesOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|N",
        help="Share the rows between N processes, each with a GPU of its own; auto: one for each "
        "GPU; default: one process.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let Python code from the model's folder run; a recipe alone cannot allow it.",
    ),
]
BasePathOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Where the run's base model is now, if it moved; its weights are compared.",
    ),
]
AllowChangedBaseOption = Annotated[
    bool,
    typer.Option(
        "--allow-changed-base",
        help="Accept a base whose embeddings, head or vocabulary differ from those of the "
        "training.",
    ),
]
LoadIn4bitOption = Annotated[
    bool | None,
    typer.Option(
        "--load-in-4bit/--no-load-in-4bit",
        help="Keep the linear weights of the base in 4 bits (nf4), or unquantised; default: as in "
        "training.",
        show_default=False,
    ),
]
TorchCompileOption = Annotated[
    bool | None,
    typer.Option(
        "--torch-compile/--no-torch-compile",
        help="Compile the generation, which takes minutes at the start; default: the recipe's.",
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else.")
]


def split_names(text: str | None) -> list[str]:
    """Return the names of a list with commas."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def repeated(option: str, texts: Sequence[str]) -> list[str]:
    """Return the arguments of a command that give an option once for each text."""
    return [word for text in texts for word in (option, text)]


def write_record(
    path: Path, results: Mapping[str, Any], pictures: Mapping[str, bytes]
) -> list[Path]:
    """Write results as JSON and the pictures of them beside it; return all paths.

    The JSON comes first: it says whose the pictures are.
    """
    from moc_cli.files import write_bytes_atomic, write_json_atomic

    write_json_atomic(path, results)
    for name, content in pictures.items():
        write_bytes_atomic(path.with_name(name), content)
    return [*(path.with_name(name) for name in pictures), path]


def program() -> str:
    """Return how the user can start this program again: `moc`, or its path if not on PATH."""
    typed = Path(sys.argv[0])
    if typed.name != "moc":
        return "moc"
    installed = shutil.which("moc")
    return "moc" if installed and Path(installed).resolve() == typed.resolve() else str(typed)
