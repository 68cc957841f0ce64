"""How much memory a run takes: counted for what is kept, measured for the peak."""

import contextlib
import resource
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moc_cli.models.quantization import parts
from moc_cli.processes import Processes

ALLOCATED = "peak allocated"  # on the GPU, by torch
RESIDENT = "peak resident"  # of the whole process
COUNTED = "peak of all tensors"  # counted while one step runs


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of the frozen weights, the trainables, the optimizer, and the peak of `kind`: that of
    the training steps, and that of evaluations between them (None where there were none).
    """

    weights: int
    trainable: int
    optimizer: int
    peak: int
    kind: str
    evaluation_peak: int | None = None


class Peaks:
    """The peaks of training steps and of evaluations on a device, apart."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._earlier_peak = 0  # the peak of the steps before the last evaluation
        self.evaluation: int | None = None

    @property
    def training(self) -> int:
        """The peak of all steps so far."""
        return max(self._earlier_peak, peak_bytes(self.device))

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within it the peak is that of an evaluation."""
        self._earlier_peak = self.training
        reset_peak(self.device)
        try:
            yield
        finally:
            self.evaluation = max(self.evaluation or 0, peak_bytes(self.device))
            reset_peak(self.device)


def measure(
    model: nn.Module,
    trainables: Iterable[Tensor],
    optimizer: int,
    peaks: Peaks,
    processes: Processes,
) -> TrainingMemory:
    """Return what a training takes, with the largest peaks of all processes; joint.

    `optimizer` is the size of its state in bytes.
    """
    evaluation = [peak for peak in processes.gather(peaks.evaluation) if peak is not None]
    return TrainingMemory(
        weights=tensor_bytes(p for p in model.parameters() if not p.requires_grad),
        trainable=tensor_bytes(trainables),
        optimizer=optimizer,
        peak=max(processes.gather(peaks.training)),
        kind=peak_kind(peaks.device),
        evaluation_peak=max(evaluation, default=None),
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of `tensors` in this process, each counted once, with the scales of
    quantised ones.
    """
    unique = {id(part): part for tensor in tensors for part in parts(tensor)}
    local_tensors = [t.to_local() if isinstance(t, DTensor) else t for t in unique.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in local_tensors)


def peak_kind(device: torch.device) -> str:
    """Say what `peak_bytes` measures on `device`."""
    return ALLOCATED if device.type == "cuda" else RESIDENT


def peak_bytes(device: torch.device) -> int:
    """Return the peak since `reset_peak` (since the start, where the system cannot reset it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
