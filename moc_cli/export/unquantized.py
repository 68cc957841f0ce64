"""Formats that hold whole weights are written from the unquantised base of a run, and say how far
its logits are from those of the run on the base as it was trained.
"""

from collections.abc import Callable

from moc_cli.errors import MocError
from moc_cli.export import find_format, parity
from moc_cli.load_run import LoadedRun
from moc_cli.models.load import load_config
from moc_cli.models.quantization import stored_as
from moc_cli.recipe.quantization import asked_for, unquantized
from moc_cli.recipe.schema import Recipe
from moc_cli.report.numbers import percent
from moc_cli.runs import BaseOptions


def check_stored(to: str, recipe: Recipe, base: BaseOptions) -> None:
    """Raise MocError where a format needs weights that the base's files hold quantised alone."""
    if not find_format(to).holds_base:
        return
    model = recipe.model
    moved = base.path is not None
    name = str(base.path) if moved else model.model_name_or_path
    config = load_config(
        name,
        revision=None if moved else model.revision,
        trust_remote_code=model.trust_remote_code,
    )
    stored = stored_as(name, config)
    if stored is not None:
        raise MocError(
            f"{to} writes the weights of the base, and '{name}' holds them in {stored} alone",
            "name the unquantised base that it was made from: --base-path DIR; or take "
            "--to controls",
        )


def open_for(
    to: str, recipe: Recipe, open_with: Callable[..., LoadedRun]
) -> tuple[LoadedRun, tuple[str, ...]]:
    """Return the run on the base that a format needs; a sentence where it is another than trained.

    `open_with` opens the run with a `recipe`.
    """
    quantization = asked_for(recipe.model)
    if not find_format(to).holds_base or quantization is None:
        return open_with(recipe=recipe), ()
    as_trained = parity.reference(open_with(recipe=recipe))
    run = open_with(recipe=unquantized(recipe))
    figures = parity.compare(as_trained, parity.reference(run).logits)
    note = (
        f"Written from the unquantised base, in {run.dtype}; trained on it in {quantization}. "
        f"Logits are within {figures['max_difference']:.3g} "
        f"({figures['relative_difference']:.2g} of the largest) of those of the run, "
        f"{percent(figures['same_best'])} have the same most likely token."
    )
    return run, (note,)
