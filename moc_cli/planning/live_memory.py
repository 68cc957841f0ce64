"""The bytes of all tensors that live on one kind of device, by part of a training."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

BLOCK = 512  # bytes; the allocator of CUDA gives multiples of it


class LiveMemory(TorchDispatchMode):
    """Within it every new storage on `device` counts until it is freed, each one once.

    A storage belongs to the part that `part()` names when it is made. `live` holds the bytes of
    each part now, `parts` those at the highest total since `restart`, which is `peak`. What a
    kernel allocates for itself and gives back is not seen.
    """

    def __init__(self, device: str, part: Callable[[], str], *, block: int = BLOCK) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device, self.part, self.block = device, part, block
        self.live: Counter[str] = Counter()
        self.total = 0
        self.restart()
        self._part_of: dict[int, str] = {}
        self._size_of: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def restart(self) -> None:
        """Begin a new measurement of the peak."""
        self.peak, self.parts = self.total, dict(self.live)

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
        size = -(-storage.nbytes() // self.block) * self.block
        if size == 0:
            return
        self._part_of[key], self._size_of[key] = part or self.part(), size
        self._watched[key] = weakref.ref(storage, lambda _: self._free(key))
        self.live[self._part_of[key]] += size
        self.total += size
        if self.total > self.peak:
            self.restart()

    def _free(self, key: int) -> None:
        del self._watched[key]
        size = self._size_of.pop(key)
        self.live[self._part_of.pop(key)] -= size
        self.total -= size
