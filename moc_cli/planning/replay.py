"""Steps of the real training loop on a fake device, with what they take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from moc_cli.data.batches import LossKind
from moc_cli.methods import Adapted
from moc_cli.planning.fake_device import META, FakeDevice
from moc_cli.planning.live_memory import LiveMemory
from moc_cli.training.checkpoint import Checkpoints
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop import Loop
from moc_cli.training.loop_types import Data, Settings

Batch = dict[str, Tensor]
STEPS = 2  # the first makes the optimizer's state, the second runs with it


class _OneDevice:
    """What the loop asks of accelerate, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def prepare_model(self, model: nn.Module) -> nn.Module:
        return model

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        return optimizer

    def backward(self, loss: Tensor) -> None:
        loss.backward()


class _SameBatch:
    """An endless epoch of one batch."""

    def __init__(self, rows: int, count: int) -> None:
        self._plan = [list(range(rows))] * count

    def epoch(self, number: int) -> list[list[int]]:
        return self._plan


class Phases:
    """What a loop does now: forward (of the base model), backward, optimizer, else loss."""

    def __init__(self, loop: Loop) -> None:
        self._now = "loss"
        base = loop.adapted.model.base_model
        self._handles = [
            base.register_forward_pre_hook(self._entering("forward")),
            base.register_forward_hook(self._entering("loss")),
            loop.optimizer.register_step_pre_hook(self._entering("optimizer")),
            loop.optimizer.register_step_post_hook(self._entering("loss")),
        ]

    def __call__(self) -> str:
        """The phase."""
        return "backward" if torch._C._current_graph_task_id() != -1 else self._now

    def part(self) -> str:
        """The part to which memory belongs that is allocated now."""
        phase = self()
        return "activations" if phase in ("forward", "backward") else phase

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _entering(self, phase: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._now = phase

        return enter


@dataclass(frozen=True)
class Measured:
    """What the last of a replay's steps took.

    `parts` are the bytes by part at the peak: weights, controls, gradients, optimizer, activations
    and loss. `flops` and `moved` (bytes that kernels read and write) are of a whole step.
    """

    parts: dict[str, int]
    peak: int
    flops: int
    moved: int
    fake: FakeDevice


def replay(
    adapted: Adapted, batch: Batch, kind: LossKind, settings: Settings, like: str = "cuda"
) -> Measured:
    """Take steps on copies of one batch, with a model on the meta device as if on `like`.

    The loop is the one of `moc train`. No file is written and no random state is used up.
    """
    loop = make_loop(adapted, batch, kind, settings, META)
    phases = Phases(loop)
    fake = FakeDevice(like, phases)
    with counted(loop, phases, META) as memory, fake, loop.usage:
        for _ in range(STEPS):
            fake.forget()
            memory.restart()
            loop.train_step()
    phases.remove()
    return Measured(memory.parts, memory.peak, fake.flops, fake.moved, fake)


def make_loop(
    adapted: Adapted, batch: Batch, kind: LossKind, settings: Settings, device: torch.device
) -> Loop:
    """Return a loop on `device` whose every micro-batch is `batch`, ready for its first step."""
    rows = batch["input_ids"].shape[0]
    nowhere = Path("never written")
    epochs = _SameBatch(rows, settings.gradient_accumulation_steps * STEPS)
    loop = Loop(
        adapted,
        Data(epochs, lambda _: dict(batch), kind),
        settings,
        accelerator=cast(Any, _OneDevice(device)),
        checkpoints=Checkpoints(nowhere),
        log=MetricsLog(nowhere),
    )
    loop.plan = epochs.epoch(0)
    loop.model.train()
    return loop


@contextmanager
def counted(loop: Loop, phases: Phases, device: torch.device) -> Iterator[LiveMemory]:
    """Within it the memory of a loop's steps is counted by part."""
    memory = LiveMemory(device.type, phases.part)
    trainables = list(loop.named.values())
    model = loop.adapted.model
    memory.assign(trainables, "controls")
    memory.assign([p for p in model.parameters() if not p.requires_grad], "weights")
    memory.assign(model.buffers(), "weights")

    def keep(parameter: Tensor) -> None:
        if parameter.grad is not None:
            memory.assign([parameter.grad], "gradients")

    handles = [p.register_post_accumulate_grad_hook(keep) for p in trainables]
    try:
        with memory:
            yield memory
    finally:
        for handle in handles:
            handle.remove()
