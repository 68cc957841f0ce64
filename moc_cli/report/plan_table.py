"""What `moc plan` prints, as tables."""

from collections.abc import Mapping
from typing import Any

from moc_cli.report.numbers import MISSING, byte_size, decimal, duration, percent
from moc_cli.report.tables import FittedTable

# Parts of a step, and what else may need more than a step, as the JSON names them.
PARTS = {
    "weights": "weights",
    "controls": "controls and gates",
    "optimizer": "optimizer state",
    "buffer": "buffer of gradients, for the sum over processes",
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
    plan = results["plans"][0]
    sizes = [(shown, plan["parts"][part]) for part, shown in PARTS.items()]
    rows = [[shown, byte_size(size)] for shown, size in sizes if size]
    rows.append(["peak", byte_size(plan["peak_bytes"])])
    return FittedTable(f"Memory of {setting_name(plan)}", ["part", "size"], rows, totals=1)


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
            duration(plan["seconds"]),
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
            notes.append("seconds a step and in all: estimated from the listed rates of the card")
    if results["plans"][0]["processes"] > 1:
        notes.append(f"memory, rows and time are those of {_each_process(results['plans'][0])}")
    return FittedTable("Settings", head, rows, notes=notes)


def wire_table(results: Mapping[str, Any]) -> list[FittedTable]:
    """Show what each process sends in a step, and how long that takes; nothing for one process."""
    plan = results["plans"][0]
    processes, step = plan["processes"], plan["step_seconds"]
    if processes == 1:
        return []
    rows = [
        [link, decimal(1000 * seconds, 2), _share(seconds, step)]
        for link, seconds in plan["wire_seconds"].items()
    ]
    of_step = plan["per_device_train_batch_size"] * plan["gradient_accumulation_steps"]
    notes = [
        f"in a step of {processes * of_step} rows, {_each_process(plan)} sends "
        f"{byte_size(plan['wire_bytes'])}",
        "ms a step, if nothing is computed meanwhile: an assumed share of the listed rates",
    ]
    return [FittedTable("On the wire", ["link", "ms a step", "share of the step"], rows, notes)]


def _each_process(plan: Mapping[str, Any]) -> str:
    return f"each of {plan['processes']} processes ({plan['strategy']})"


def _share(seconds: float, step: float | None) -> str:
    return MISSING if step is None else percent(seconds / (step + seconds))


def setting_name(plan: Mapping[str, Any]) -> str:
    """Return a planned setting in a few words."""
    rows = plan["per_device_train_batch_size"]
    return f"{plan['method']}, {plan['activation_checkpointing']}, {rows} rows, {bits_of(plan)}"


def bits_of(plan: Mapping[str, Any]) -> str:
    """Return how a planned base is kept."""
    return "4-bit" if plan["load_in_4bit"] else "8-bit" if plan["load_in_8bit"] else "16/32-bit"
