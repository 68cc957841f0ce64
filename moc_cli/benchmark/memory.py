"""The peak memory of one training step: read from the allocator of a GPU, counted on a CPU."""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from moc_cli.planning.replay import Phases, counted
from moc_cli.training.loop import Loop
from moc_cli.training.memory import tensor_bytes


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes at most, and those `kept` between steps: weights, trained parameters
    and the optimizer's state. None where they are not known.
    """

    peak: int | None
    kept: int

    @property
    def working(self) -> int | None:
        """Bytes of a step beyond those that are kept: activations, gradients, the loss."""
        return None if self.peak is None else self.peak - self.kept


def measure_peak(loop: Loop) -> StepMemory:
    """Take one more step, and return what its model alone needs; the other models do not count."""
    kept_bytes = tensor_bytes(_kept_tensors(loop))
    if loop.device.type != "cuda":
        return StepMemory(_counted_peak(loop), kept_bytes)
    torch.cuda.synchronize(loop.device)
    torch.cuda.reset_peak_memory_stats(loop.device)
    bytes_before = torch.cuda.memory_allocated(loop.device)
    loop.train_step()
    torch.cuda.synchronize(loop.device)
    return StepMemory(
        torch.cuda.max_memory_allocated(loop.device) - bytes_before + kept_bytes, kept_bytes
    )


def _counted_peak(loop: Loop) -> int:
    """Take a step, and return the highest number of bytes in tensors of its model."""
    phases = Phases(loop)
    with counted(loop, phases, loop.device) as memory:
        memory.assign(_optimizer_state(loop), "optimizer")
        memory.restart()
        loop.train_step()
    phases.remove()
    return memory.peak


def _kept_tensors(loop: Loop) -> list[Tensor]:
    model = loop.adapted.model
    trained = loop.named.values()
    return [*model.parameters(), *model.buffers(), *trained, *_optimizer_state(loop)]


def _optimizer_state(loop: Loop) -> list[Tensor]:
    values = chain.from_iterable(state.values() for state in loop.optimizer.state.values())
    return [value for value in values if isinstance(value, Tensor)]
