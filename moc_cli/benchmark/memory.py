"""The peak memory of one training step: measured by the allocator of a GPU."""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from moc_cli.training.loop import Loop
from moc_cli.training.memory import tensor_bytes


@dataclass(frozen=True)
class Memory:
    """Bytes that a step takes at most, and those `kept` between steps: weights, trained parameters
    and the optimizer's state. None where the device does not tell.
    """

    peak: int | None
    kept: int

    @property
    def working(self) -> int | None:
        """Bytes of a step beyond those that are kept: activations, gradients, the loss."""
        return None if self.peak is None else self.peak - self.kept


def measure_peak(loop: Loop) -> Memory:
    """Take one more step, and return what its model alone needs; the other models do not count."""
    kept = tensor_bytes(_kept(loop))
    if loop.device.type != "cuda":
        return Memory(None, kept)
    torch.cuda.synchronize(loop.device)
    torch.cuda.reset_peak_memory_stats(loop.device)
    before = torch.cuda.memory_allocated(loop.device)
    loop.train_step()
    torch.cuda.synchronize(loop.device)
    return Memory(torch.cuda.max_memory_allocated(loop.device) - before + kept, kept)


def _kept(loop: Loop) -> list[Tensor]:
    model = loop.adapted.model
    states = (state.values() for state in loop.optimizer.state.values())
    values = chain(model.parameters(), model.buffers(), loop.named.values(), *states)
    return [value for value in values if isinstance(value, Tensor)]
