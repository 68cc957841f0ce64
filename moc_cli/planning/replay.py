"""Steps of the real training loop on a fake device, with what they take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from moc_cli.kinds.loss import TaskLoss
from moc_cli.methods import Adapted
from moc_cli.planning.evaluation import Scoring, score
from moc_cli.planning.fake_device import META, FakeDevice
from moc_cli.planning.live_memory import LiveMemory, PhasePart
from moc_cli.processes import Processes
from moc_cli.training import optim
from moc_cli.training.checkpoint import Checkpoints
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop import Loop
from moc_cli.training.loop_types import Data, Settings

Batch = dict[str, Tensor]
# The parts that the memory belongs to which a phase takes; others have parts of their names.
_PART_OF = {"forward": "activations", "backward": "activations", "resume": "optimizer"}
STEPS = 2  # a loop on one batch can take so many


class _OneDevice:
    """What the loop asks of accelerate, on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

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
    """What a loop does now: forward (of the base model), loss, backward or optimizer.

    The forward begins with the base model's and ends with it; the backward pass begins where its
    states get their gradient, for a loss may run a backward pass of its own.
    """

    def __init__(self, loop: Loop) -> None:
        self._phase = "optimizer"
        base = loop.adapted.model.base_model
        self._handles = [
            base.register_forward_pre_hook(self._entering("forward"), prepend=True),
            base.register_forward_hook(self._after_forward),
            loop.optimizer.register_step_pre_hook(self._entering("optimizer")),
        ]

    def __call__(self) -> str:
        """The phase."""
        return self._phase

    def current(self) -> PhasePart:
        """The phase, and the part to which memory belongs that is taken now."""
        return PhasePart(self._phase, _PART_OF.get(self._phase, self._phase))

    def enter(self, phase: str) -> None:
        """Say which phase begins, where no hook can tell."""
        self._phase = phase

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _entering(self, phase: str) -> Callable[..., None]:
        return lambda *_: self.enter(phase)

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self._phase = "loss"
        if output[0].requires_grad:
            output[0].register_hook(self._entering("backward"))


@dataclass(frozen=True)
class StepMeasurement:
    """What a step took.

    `phases` are the bytes by part at the peak of each phase: weights, controls, gradients,
    optimizer, activations and loss.
    """

    phases: dict[str, dict[str, int]]
    fake: FakeDevice


def replay(
    adapted: Adapted,
    batch: Batch,
    loss: type[TaskLoss],
    settings: Settings,
    device_type: str = "cuda",
    *,
    scoring: Scoring | None = None,
) -> StepMeasurement:
    """Take a step on a batch, with a model on the meta device as if on `device_type`.

    The loop is the one of `moc train`, after earlier steps: the optimizer's state is there, and
    where several micro-batches make a step, so are the gradients of the one before. The optimizer
    is AdamW, whatever the settings say. No file is written and no random state is used up. Then a
    batch is scored, where `scoring` says how.
    """
    step_settings = replace(settings, gradient_accumulation_steps=1, processes=1, optim="adamw")
    loop = make_loop(adapted, batch, loss, step_settings, META)
    phases = Phases(loop)
    fake = FakeDevice(device_type, phases)
    with counted(loop, phases, META) as memory:
        with fake:
            _take_steps_before(loop, memory, foreach=device_type == "cuda")
            if settings.gradient_accumulation_steps > 1:
                _make_gradients(loop, memory)
            fake.forget()
            memory.restart()
            loop.train_step()
        with FakeDevice(device_type):
            phases.enter("checkpoint_saving")
            memory.look()
            loop.adapted.state()
            tensors = optim.optimizer_tensors(loop.optimizer, loop.named)
            loop.optimizer.state.clear()
            phases.enter("resume")
            memory.look()
            optim.load_optimizer_tensors(loop.optimizer, loop.named, tensors)
            del tensors
            phases.remove()
            if scoring is not None:
                phases.enter("evaluation")
                memory.look()
                score(adapted, scoring)
    return StepMeasurement(memory.peaks, fake)


def _take_steps_before(loop: Loop, memory: LiveMemory, *, foreach: bool) -> None:
    """Make the optimizer's state."""
    for group in loop.optimizer.param_groups:
        group["foreach"] = foreach  # what torch chooses on a GPU
    _make_gradients(loop, memory)
    loop.optimizer.step()
    loop.optimizer.zero_grad(set_to_none=True)


def _make_gradients(loop: Loop, memory: LiveMemory) -> None:
    for parameter in loop.named.values():
        parameter.grad = torch.empty_like(parameter)
        memory.assign([parameter.grad], "gradients")


def make_loop(
    adapted: Adapted,
    batch: Batch,
    loss: type[TaskLoss],
    settings: Settings,
    device: torch.device,
) -> Loop:
    """Return a loop on `device` whose every micro-batch is `batch`, ready for its first step."""
    rows = batch["input_ids"].shape[0]
    nowhere = Path("never written")
    epochs = _SameBatch(rows, settings.gradient_accumulation_steps * STEPS)
    loop = Loop(
        adapted,
        Data(epochs, lambda _: dict(batch), loss),
        settings,
        accelerator=cast(Any, _OneDevice(device)),
        checkpoints=Checkpoints(nowhere),
        log=MetricsLog(nowhere),
        processes=Processes(),
    )
    loop.plan = epochs.epoch(0)
    loop.model.train()
    return loop


@contextmanager
def counted(loop: Loop, phases: Phases, device: torch.device) -> Iterator[LiveMemory]:
    """Within it the memory of a loop's steps is counted by part."""
    memory = LiveMemory(device.type, phases.current)
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
