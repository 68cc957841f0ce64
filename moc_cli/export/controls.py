"""`controls`: the two files of an adapter, to be put in the same base with `load_controls`.

In a narrower type each control's A and B are rounded; gates and whole modules stay in float32: they
are small, and a rounded gate would turn near ties the other way.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from moc_cli.adapter.folder import write_adapter
from moc_cli.export import FormatOptions, parity
from moc_cli.export.card import base_code
from moc_cli.export.parity import Written
from moc_cli.load_run import LoadedRun

_KEPT = ("gates.", "modules.")


def export(trained: LoadedRun, folder: Path, options: FormatOptions) -> Written:
    """Write the adapter; loaded by a fresh process it must give our logits to the bit.

    In float16 and bfloat16 that is the run with its controls rounded in the same way; the distance
    to the unrounded run has to stay within the type's tolerance, and is reported.
    """
    dtype = options.dtype or "float32"
    exact_state = trained.adapted.state()
    state = rounded(exact_state, getattr(torch, dtype))
    loading = write_controls(trained, folder, state)
    exact = parity.reference(trained)
    trained.adapted.load_state(state)
    reference = parity.reference(trained)
    trained.adapted.load_state(exact_state)
    rounding = None
    notes: tuple[str, ...] = ()
    if dtype != "float32":
        rounding = parity.check_tolerance(parity.compare(exact, reference.logits), dtype)
        notes = (f"Controls in {dtype}; gates, vectors and whole modules in float32.",)
    return Written(
        loading,
        reference,
        dtype=dtype,
        tolerance=0,
        rounding=rounding,
        notes=notes,
        library="moc",
    )


def write_controls(
    trained: LoadedRun, folder: Path, state: dict[str, Tensor], **changes: Any
) -> str:
    """Write an adapter of the run with these numbers, and `changes` to what its config says; return
    the Python that loads it.
    """
    step = trained.adapter_config.get("step")
    config = trained.adapted.adapter_config() | trained.base | {"step": step} | changes
    write_adapter(folder, config, save(state, {"format": "pt"}))
    lines = ["from moc_cli import load_controls", base_code(trained)]
    return "\n".join([*lines, "load_controls(model, folder)"])


def rounded(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Round the matrices of controls and of LoRA; all else is kept as it is."""
    return {
        name: value.to(dtype) if value.ndim > 1 and not name.startswith(_KEPT) else value
        for name, value in state.items()
    }
