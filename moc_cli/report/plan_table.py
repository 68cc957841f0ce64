"""What `moc plan` tells, as tables."""

from collections.abc import Mapping
from typing import Any

from moc_cli.report.numbers import MISSING, byte_size, decimal, duration
from moc_cli.report.tables import FittedTable

# Parts of a step, and what else may need more than a step, as the JSON names them.
PARTS = {
    "weights": "weights",
    "controls": "controls and gates",
    "optimizer": "optimizer state",
    "gradients": "gradients",
    "activations": "activations",
    "loss": "loss",
    "evaluation": "evaluation of one batch, instead of a step",
    "checkpoint_saving": "saving a checkpoint, instead of a step",
    "resume": "resuming, instead of a step",
    "overhead": "CUDA context and allocator, assumed",
}


def parts_table(results: Mapping[str, Any]) -> FittedTable:
    """Show the memory of the recipe's own setting by part; `results` is the JSON of `moc plan`."""
    own = results["plans"][0]
    rows = [[shown, byte_size(own["parts"][part])] for part, shown in PARTS.items()]
    rows.append(["peak", byte_size(own["peak_bytes"])])
    return FittedTable(f"Memory of {setting_name(own)}", ["part", "size"], rows, totals=1)


def plans_table(results: Mapping[str, Any]) -> FittedTable:
    """Show every setting: its memory, its time, and whether it fits."""
    device = results["device"]
    head = ["setting", "rows", "base", "memory", "s a step", "time", "fits"]
    rows = [
        [
            " ".join([plan["method"], *plan["changes"], plan["activation_checkpointing"]]),
            f"{plan['per_device_train_batch_size']} x {plan['gradient_accumulation_steps']}",
            bits_of(plan),
            byte_size(plan["peak_bytes"]),
            decimal(plan["step_seconds"], 2),
            MISSING if plan["seconds"] is None else duration(plan["seconds"]),
            {True: "yes", False: "no", None: MISSING}[plan["fits"]],
        ]
        for plan in results["plans"]
    ]
    notes = ["rows: rows of a micro-batch x micro-batches of a step"]
    if device is not None:
        notes.append(f"card: {device['name']}, {byte_size(device['memory'])}")
        if device["half"] is None:
            notes.append("time: not known for a card of which only the size is")
        else:
            notes.append("s a step, time of all steps: assumed shares of the listed rates")
    return FittedTable("Settings", head, rows, notes=notes)


def setting_name(plan: Mapping[str, Any]) -> str:
    """Return a planned setting in a few words."""
    rows = plan["per_device_train_batch_size"]
    return f"{plan['method']}, {plan['activation_checkpointing']}, {rows} rows, {bits_of(plan)}"


def bits_of(plan: Mapping[str, Any]) -> str:
    """Return how a planned base is kept."""
    return "4-bit" if plan["load_in_4bit"] else "8-bit" if plan["load_in_8bit"] else "16/32-bit"
