"""The bytes of all tensors that live on one kind of device, by part of a training."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 512  # bytes; the allocator of CUDA gives multiples of it


class PhasePart(NamedTuple):
    """The phase that a program is in, and the part to which memory belongs that it takes now."""

    phase: str
    part: str


def highest(phases: Iterable[dict[str, int]]) -> dict[str, int]:
    """The bytes by part of the phase in which they are the most."""
    return max(phases, key=lambda parts: sum(parts.values()))


class LiveMemory(TorchDispatchMode):
    """Within it every new storage on `device` counts until it is freed, each one once.

    A storage belongs to the part that `current()` names when it is made. `live` holds the bytes of
    each part now; `peaks` those at the highest total in each phase since `restart`. What a kernel
    allocates for itself and gives back is not seen.
    """

    def __init__(self, device: str, current: Callable[[], PhasePart]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.current = device, current
        self.live: Counter[str] = Counter()
        self.total = 0
        self._part_of: dict[int, str] = {}
        self._size_of: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.restart()

    def restart(self) -> None:
        """Begin a new measurement of the peaks."""
        self.peaks: dict[str, dict[str, int]] = {}
        self._highest: dict[str, int] = {}
        self.look()

    def look(self) -> None:
        """Count what is there now to the phase of now."""
        self._look(self.current().phase)

    @property
    def peak(self) -> int:
        """The highest total."""
        return max(self._highest.values())

    def assign(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count tensors that are there already to a part."""
        for tensor in tensors:
            if tensor.device.type == self.device:
                self._add(tensor, part)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.device.type == self.device:
                self._add(value, None)
        return result

    def _add(self, tensor: Tensor, part: str | None) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._size_of:
            if part is not None and part != self._part_of[key]:
                self.live[self._part_of[key]] -= self._size_of[key]
                self.live[part] += self._size_of[key]
                self._part_of[key] = part
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        if size == 0:
            return
        current = self.current()
        self._part_of[key], self._size_of[key] = part or current.part, size
        self._watched[key] = weakref.ref(storage, lambda _: self._free(key))
        self.live[self._part_of[key]] += size
        self.total += size
        self._look(current.phase)

    def _look(self, phase: str) -> None:
        if self.total >= self._highest.get(phase, 0):
            self._highest[phase] = self.total
            self.peaks[phase] = dict(self.live)

    def _free(self, key: int) -> None:
        del self._watched[key]
        size = self._size_of.pop(key)
        self.live[self._part_of.pop(key)] -= size
        self.total -= size
