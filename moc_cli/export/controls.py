"""`controls`: the two files of an adapter, to be put in the same base with `load_controls`.

In a narrower type each control's A and B are rounded; gates and whole modules stay in float32: they
are small, and a rounded gate would turn near ties the other way.
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from moc_cli.adapter.folder import CONFIG, PAYLOAD, write_adapter
from moc_cli.export import Options, parity
from moc_cli.export.card import base_code
from moc_cli.export.parity import Written
from moc_cli.load_run import LoadedRun

_KEPT = ("gates.", "modules.")


def export(trained: LoadedRun, folder: Path, options: Options) -> Written:
    """Write the adapter; loaded by a fresh process it must give our logits to the bit.

    In float16 and bfloat16 that is the run with its controls rounded in the same way; the distance
    to the unrounded run has to stay within the type's tolerance, and is reported.
    """
    dtype = options.dtype or "float32"
    exact_state = trained.adapted.state()
    state = rounded(exact_state, getattr(torch, dtype))
    config = (
        trained.adapted.adapter_config()
        | trained.base
        | {"step": trained.adapter_config.get("step")}
    )
    write_adapter(folder, config, save(state, {"format": "pt"}))
    exact = parity.reference(trained)
    trained.adapted.load_state(state)
    ours = parity.reference(trained)
    trained.adapted.load_state(exact_state)
    lines = ["from moc_cli import load_controls", base_code(trained)]
    loading = "\n".join([*lines, "load_controls(model, folder)"])
    rounding = None
    notes: tuple[str, ...] = ()
    if dtype != "float32":
        rounding = parity.check_tolerance(parity.compare(exact, ours.logits), dtype)
        notes = (f"Controls in {dtype}; gates, vectors and whole modules in float32.",)
    return Written(
        (CONFIG, PAYLOAD),
        loading,
        ours,
        dtype=dtype,
        tolerance=0,
        rounding=rounding,
        notes=notes,
        library="moc",
    )


def rounded(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Round the matrices of controls and of LoRA; all else is kept as it is."""
    return {
        name: value.to(dtype) if value.ndim > 1 and not name.startswith(_KEPT) else value
        for name, value in state.items()
    }
