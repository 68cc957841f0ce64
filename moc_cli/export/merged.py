"""`merged`: LoRA or DoRA folded into the base's weights, as a plain Hugging Face folder."""

from pathlib import Path

import torch

from moc_cli.errors import MocError
from moc_cli.export import FormatOptions, parity
from moc_cli.export.card import whole_code
from moc_cli.export.parity import Written
from moc_cli.load_run import LoadedRun
from moc_cli.models.load import without_bars
from moc_cli.recipe.schema import Recipe

_AROUND = (
    "a control runs beside a whole block, from the state that enters the block's norm to the "
    "block's output, and no single weight inside the block does that"
)
_STANDALONE = "take --to standalone: one Hugging Face folder that needs no moc"
_WHY = {  # and what to do instead
    "moc": (f"{_AROUND}; and its gate adds other controls for every row", _STANDALONE),
    "control": (_AROUND, _STANDALONE),
    "molex": (
        "its gate picks a second whole layer for every row, which no weight can do",
        "take --to controls: the adapter for load_controls",
    ),
}


def check(recipe: Recipe) -> None:
    """Raise MocError for methods that weights alone cannot hold."""
    name = recipe.method.name
    if name in _WHY:
        reason, instead = _WHY[name]
        raise MocError(f"a run of {name} cannot be merged: {reason}", instead)
    if recipe.model.trust_remote_code:
        raise MocError(
            "merged writes weights and no code, and this base needs code from its own folder",
            "take --to controls",
        )


def export(trained: LoadedRun, folder: Path, options: FormatOptions) -> Written:
    """Merge in float32, round to the file's type, and write model, tokenizer and settings.

    W x + B (A x) and (W + B A) x agree up to rounding, not to the bit, hence the tolerance.
    """
    model = trained.adapted.model
    dtype = options.dtype or trained.dtype
    base_dtype, expected = trained.dtype, parity.reference(trained)
    model.to(dtype=torch.float32)  # type: ignore[call-arg]
    trained.adapted.merge()
    model.to(getattr(torch, dtype))
    with without_bars():
        model.save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)
    return Written(
        whole_code(trained, f'dtype="{dtype}"'),
        expected,
        dtype=dtype if dtype != "float32" else base_dtype,
        notes=(f"Weights merged in float32, kept in {dtype}.",),
    )
