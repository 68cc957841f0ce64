"""Carry what a run learned to other places: one module a format, each proven before it is done.

A format is a function `export(trained, folder, options) -> Exported` that fills an empty folder and
has a fresh process read it back (see `parity`). The folder gets its name only afterwards; the
session writes the model card and prints the sizes. A format's module may also have
`check(recipe, options)`, which raises MocError for what can be known before weights are loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moc_cli.errors import MocError
from moc_cli.recipe.suggest import choices

if TYPE_CHECKING:
    from moc_cli.load_run import LoadedRun

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Options:
    """What a user may choose; a format refuses what it cannot give.

    `dtype` is the type of the numbers in the file, None the format's own choice; `calibration` the
    rows of each task on which `static` counts routes.
    """

    dtype: Dtype | None = None
    calibration: int = 64
    silent: bool = False


@dataclass(frozen=True)
class Exported:
    """What a format wrote.

    `files` are names relative to the folder; `parity` is what `parity.check` gave, with a format's
    own figures beside it; `notes` are sentences for the user and the card; `loading` is Python for
    the card that leaves the model in `model`, given the path in `folder`; `library` is the card's
    `library_name`.
    """

    files: tuple[str, ...]
    parity: dict[str, Any]
    notes: tuple[str, ...] = ()
    loading: str = ""
    library: str = "transformers"
    facts: dict[str, Any] = field(default_factory=dict)


Export = Callable[["LoadedRun", Path, Options], Exported]

FORMATS: dict[str, str] = {
    "controls": "moc_cli.export.controls:export",
    "peft": "moc_cli.export.peft:export",
    "standalone": "moc_cli.export.standalone:export",
    "static": "moc_cli.export.static:export",
    "merged": "moc_cli.export.merged:export",
}


def find_format(name: str) -> Export:
    """Return the function that writes a format; raises MocError naming those that there are."""
    if name not in FORMATS:
        raise MocError(f"--to {name!r} is not a format{choices(name, FORMATS)}")
    module, _, function = FORMATS[name].partition(":")
    found: Export = getattr(import_module(module), function)
    return found
