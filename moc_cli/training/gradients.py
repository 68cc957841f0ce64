"""The gradients of a window, over all processes that train together.

Each process works on its share of the window's micro-batches. Then the sums of all gradients, and
what all must know of each other, travel in one float32 tensor and one call. No wrapper goes around
the model, so that a process without a micro-batch in a short window adds zeros.
"""

import math
import signal
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moc_cli.errors import MocError
from moc_cli.methods import Adapted
from moc_cli.nn.joint import VotesOfProcesses
from moc_cli.processes import Processes
from moc_cli.scoring.batch_size import is_out_of_memory, is_sharded
from moc_cli.signals import STOPS
from moc_cli.training import rng
from moc_cli.training.loop_types import Data, Settings

SIGNALS = (signal.SIGINT, *STOPS)
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class WindowSum:
    """What came out of a window, the same in every process.

    `losses` are the shares of its micro-batches in its loss and `norm` is that of the gradient;
    `fits` is false where a process ran out of memory, `signal` is what asks one of them to stop.
    """

    losses: list[float]
    norm: float
    fits: bool
    signal: int | None

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return all(map(math.isfinite, [*self.losses, self.norm]))


class Gradients:
    """Makes the gradients of windows of `adapted`'s trainables."""

    def __init__(
        self,
        adapted: Adapted,
        data: Data,
        settings: Settings,
        accelerator: Accelerator,
        processes: Processes,
    ) -> None:
        self._adapted, self._settings = adapted, settings
        self._accelerator, self._processes = accelerator, processes
        sync, sharded = settings.routing_sync, is_sharded(adapted.model)
        # Whether processes meet in the middle of a forward: all must run as many of them.
        self._joint = processes.world > 1 and (sync or sharded)
        if sync and self._joint and adapted.mixture is not None:
            adapted.mixture.joint = VotesOfProcesses(processes)
        self._parameters = list(adapted.named_trainables().values())
        self.loss = data.loss(adapted.model, accelerator.device)
        numbers = settings.window + 1 + len(SIGNALS)
        self._bucket = Bucket(self._parameters, processes, numbers)

    def of_window(
        self,
        batches: Sequence[Batch],
        place: tuple[int, int],
        *,
        signal: int | None,
        after_forward: Callable[[], None],
        meanwhile: Callable[[], None],
    ) -> WindowSum:
        """Add the gradients of a window and clip them.

        `place` is the epoch and its first micro-batch; `signal` has come to this process;
        `after_forward` is done after the forward of each micro-batch of this process, `meanwhile`
        while the device works.
        """
        device = self._accelerator.device
        targets = max(1, sum(self.loss.count_targets(batch["labels"]) for batch in batches))
        # With routing.sync the micro-batches of all processes vote at once.
        together = self._processes.world if self._settings.routing_sync else 1
        self._adapted.set_loss_scale(1.0 / math.ceil(len(batches) / together))
        losses = torch.zeros(len(batches), device=device)
        with self._processes.meeting():
            fits = self._add(batches, losses, targets, place, after_forward)
        flags = [not fits, *(signal == number for number in SIGNALS)]
        sums = self._bucket.sum(losses, flags)
        limit = self._settings.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, limit)
        meanwhile()
        # The step's only wait for the device: all that decides whether it may be taken.
        *values, total = torch.cat([sums, norm.to(sums).reshape(1)]).tolist()
        values, gathered = values[: len(batches)], values[len(batches) :]
        short, *signals = gathered or flags
        heard = next((n for n, came in zip(SIGNALS, signals, strict=True) if came), None)
        return WindowSum(values, total, not short, heard)

    def _add(
        self,
        batches: Sequence[Batch],
        losses: Tensor,
        targets: int,
        place: tuple[int, int],
        after_forward: Callable[[], None],
    ) -> bool:
        """Add the gradients of this process's micro-batches; False where memory was short."""
        epoch, first = place
        own_numbers = self._processes.share(range(len(batches)))
        try:
            for number in own_numbers:
                if self._processes.world > 1:  # dropout does not depend on who draws it
                    rng.seed_torch(self._settings.seed, epoch, first + number)
                value = self.loss(batches[number], targets)
                after_forward()
                self._accelerator.backward(value)
                losses[number] = value.detach()
            if self._joint and len(own_numbers) * self._processes.world < len(batches):
                self._attend(batches[-1], targets)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self._joint:
                raise MocError(
                    f"a step does not fit in the memory of process {self._processes.rank}",
                    "lower train.per_device_train_batch_size, or set "
                    "train.activation_checkpointing: full",
                ) from None  # it ends in the middle of a forward that the others are in
            return False  # what the error holds in memory is free then
        return True

    def _attend(self, batch: Batch, targets: int) -> None:
        """Take part in a joint forward with a micro-batch that counts for nothing."""
        shape = batch["input_ids"].shape
        nobody = torch.zeros(shape, dtype=torch.bool, device=self._accelerator.device)
        with self._adapted.voting(nobody):
            self._accelerator.backward(self.loss(batch, targets) * 0.0)


class Bucket:
    """The gradients of some parameters in one tensor of float32, and a few numbers after them.

    Only several processes have that tensor. It is kept: (numbers of parameters) x 4 bytes.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], processes: Processes, numbers: int
    ) -> None:
        self._parameters, self._processes = list(parameters), processes
        self._sizes = [*(p.numel() for p in self._parameters), numbers]
        self._flat: Tensor | None = None
        if processes.world > 1:
            device = self._parameters[0].device
            self._flat = torch.zeros(sum(self._sizes), device=device)

    def sum(self, losses: Tensor, flags: Sequence[bool]) -> Tensor:
        """Sum the gradients over the processes in place, each missing one as zeros; joint.

        Returns the sums of `losses` (n,) and, of several processes, of the flags after them.
        """
        if self._flat is None:
            return losses
        *views, numbers = self._flat.split(self._sizes)
        for parameter, view in zip(self._parameters, views, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad.flatten())
            parameter.grad = view.view_as(parameter)
        marks = torch.tensor(flags, dtype=numbers.dtype).to(numbers.device, non_blocking=True)
        sent = torch.cat([losses, marks])
        numbers.zero_()[: len(sent)] = sent
        self._processes.sum(self._flat)
        return sent.copy_(numbers[: len(sent)])
