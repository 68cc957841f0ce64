"""Why a step could not be taken, and what to try from the state that was kept."""

import math
import shlex
from collections.abc import Sequence

from torch import Tensor

from moc_cli.data.batches import Grouping
from moc_cli.data.packing import count_rows
from moc_cli.errors import MocError
from moc_cli.training.checkpoint import Checkpoints, Counters
from moc_cli.training.gradients import WindowSum
from moc_cli.training.loop_types import Settings

RESUME = " --resume auto"  # how the command ends that continues a run


def refusal(
    total: WindowSum,
    window: Sequence[Sequence[int]],
    batches: Sequence[dict[str, Tensor]],
    place: tuple[Counters, int],
    settings: Settings,
    command: str,
    checkpoints: Checkpoints,
) -> MocError:
    """Return why a step is not taken, with the rows whose loss or gradient is not finite.

    `command` continues the run, or all of `--seeds`. `place`: the counters before the step, and the
    micro-batches of the epoch that runs.
    """
    counters, length = place
    if not total.fits:
        splits = may_split(counters.batch, settings.group_by_length)
        return out_of_memory(batches, settings, command, splits=splits)
    bad = [i for i, value in enumerate(total.losses) if not math.isfinite(value)]
    problem = f"the loss is {total.losses[bad[0]]}" if bad else f"the gradient norm is {total.norm}"
    numbers = [counters.batch + i + 1 for i in bad or range(len(window))]
    rows = [row for i in bad or range(len(window)) for row in window[i]]
    return MocError(
        f"{problem} at step {counters.step + 1}, epoch {counters.epoch + 1}, "
        f"micro-batch {', '.join(map(str, numbers))} of {length}, "
        f"training rows {', '.join(map(str, rows))}",
        _lower_rate(settings, counters.step, command, checkpoints),
    )


def _lower_rate(settings: Settings, step: int, command: str, checkpoints: Checkpoints) -> str:
    """Advise lower rates from before `step`: the state there gives the same loss at any rate.

    One checkpoint cannot continue all of `--seeds`, and these have one rate.
    """
    start = command.removesuffix(RESUME)
    rates = {
        "train.learning_rate": settings.learning_rate,
        "method.gate.learning_rate": settings.gate_learning_rate,
    }
    change = " ".join(f"--set {key}={rate / 3:.2g}" for key, rate in rates.items() if rate)
    earlier = [number for number in checkpoints.steps() if number < step]
    if not earlier or "--seeds" in shlex.split(command):
        return f"start over with a lower rate: {start} --overwrite {change}"
    path = shlex.quote(str(checkpoints.path(earlier[-1])))
    return (
        "the state before that step is kept, but gives the same again; go on from an earlier one "
        f"with a lower rate: {start} --resume {path} {change}"
    )


def may_split(batch: int, group_by_length: Grouping) -> bool:
    """Whether a run may go on with other micro-batches of the same rows a step.

    `batch`: micro-batches taken from the epoch that runs. Where rows are grouped by length, or
    dealt out by it, the order of an epoch depends on their size.
    """
    return batch == 0 or not group_by_length


def out_of_memory(
    batches: Sequence[dict[str, Tensor]], settings: Settings, command: str, *, splits: bool
) -> MocError:
    """Return the error of a step that does not fit in memory; `command` continues the run.

    `splits`: whether the run may go on with smaller micro-batches; otherwise they are another run.
    """
    largest = max(batches, key=lambda batch: batch["input_ids"].numel())
    rows, tokens = count_rows(largest), largest["input_ids"].shape[1]
    lengths = f"up to {tokens} tokens" if "attention_mask" in largest else f"{tokens} tokens in all"
    message = f"a step of {rows} rows of {lengths} does not fit in memory"
    if settings.activation_checkpointing in ("none", "selective"):
        return MocError(
            message,
            "the state before that step is kept; go on with less memory for each row: "
            f"{command} --set train.activation_checkpointing=full",
        )
    if rows > 1:
        size = settings.per_device_train_batch_size
        parts = next(number for number in range(2, size + 1) if size % number == 0)
        smaller = (
            f"--set train.per_device_train_batch_size={size // parts} "
            f"--set train.gradient_accumulation_steps="
            f"{parts * settings.gradient_accumulation_steps}"
        )
        batches_text = (
            f"batches of {size // parts} instead of {size} rows, and as many rows in a step"
        )
        if splits:
            advice = f"the state before that step is kept; go on with {batches_text}"
            return MocError(message, f"{advice}: {command} {smaller}")
        over = f"{command.removesuffix(RESUME)} --overwrite {smaller}"
        return MocError(message, f"start over with {batches_text}: {over}")
    return MocError(message, "lower data.max_length, set train.bf16: true, or use another device")
