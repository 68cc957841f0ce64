"""Export of a trained run: one module for each format, and one proof for all of them.

A format's module has a function `export(trained, folder, options) -> Written` that fills an empty
folder and says how to load it and which logits to expect. The session then has a fresh process load
the folder (see `parity`); the folder gets its name only if the logits agree. The module may also
have `check(recipe)`, which raises MocError for a run that the format cannot hold, before weights
are loaded.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Literal

from moc_cli.errors import MocError
from moc_cli.recipe.suggest import choices

if TYPE_CHECKING:
    from moc_cli.recipe.schema import Recipe

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class FormatOptions:
    """What a user may choose of a format.

    `dtype` is the type of the numbers in the file, None the format's own choice; `calibration` the
    rows of each task on which `static` counts routes.
    """

    dtype: Dtype | None = None
    calibration: int = 64


@dataclass(frozen=True)
class ExportFormat:
    """A format's module, its description, and the types that its file may have; none: the run's own
    type alone. `holds_base`: it holds the weights of the base, which must not be quantised.
    """

    module: str
    description: str
    dtypes: tuple[Dtype, ...] = ()
    holds_base: bool = False

    def load(self) -> ModuleType:
        """Import the module."""
        return import_module(self.module)


FORMATS: dict[str, ExportFormat] = {
    "controls": ExportFormat("moc_cli.export.controls", "two files for load_controls", DTYPES),
    "peft": ExportFormat("moc_cli.export.peft", "an adapter folder of peft", ("float32",)),
    "standalone": ExportFormat(
        "moc_cli.export.standalone", "a Hugging Face folder that needs no moc", holds_base=True
    ),
    "static": ExportFormat("moc_cli.export.static", "frozen routes", ("float32",)),
    "merged": ExportFormat("moc_cli.export.merged", "lora and dora only", DTYPES, holds_base=True),
}


def find_format(name: str) -> ExportFormat:
    """Return a format; raises MocError with the names of all formats for an unknown one."""
    if name not in FORMATS:
        raise MocError(f"--to {name!r} is not a format{choices(name, FORMATS)}")
    return FORMATS[name]


def find_dtype(name: str | None) -> Dtype | None:
    """Return a type of numbers, None for None; raises MocError for an unknown one."""
    if name is None:
        return None
    for dtype in DTYPES:
        if dtype == name:
            return dtype
    raise MocError(f"--dtype {name!r} is not a type{choices(name, DTYPES)}")


def check_format(name: str, recipe: "Recipe", options: FormatOptions) -> None:
    """Raise MocError where a format cannot hold a run, or not in the type of the options."""
    format = find_format(name)
    refuse = getattr(format.load(), "check", None)
    if refuse is not None:
        refuse(recipe)
    allowed = format.dtypes or ("bfloat16" if recipe.train.bf16 else "float32",)
    if options.dtype not in (None, *allowed):
        raise MocError(
            f"--dtype {options.dtype}: {name} is written in {' or '.join(allowed)}",
            "leave --dtype out",
        )
