"""Results of meta kernels, remembered: shapes alone decide them, and torch works each out again."""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Layout(NamedTuple):
    """A tensor that a kernel makes in memory of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        if 0 in self.shape:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (1 + last) * self.dtype.itemsize


LAYOUTS: dict[Any, list[_Layout] | None] = {}  # by kernel and arguments; None: is called each time


def call(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what `func(*args, **kwargs)` returns on the meta device.

    A kernel that writes into its arguments or returns their memory is called each time.
    """
    if not _only_makes(func):
        return func(*args, **kwargs)
    key = (func, _key(args), _key(tuple(kwargs.items())))
    if layouts := LAYOUTS.get(key):
        new = [
            torch.empty_strided(*layout[:2], dtype=layout.dtype, device="meta")
            for layout in layouts
        ]
        return new[0] if len(new) == 1 else tuple(new)
    result = func(*args, **kwargs)
    if key not in LAYOUTS:
        LAYOUTS[key] = _layouts(result, (*args, *kwargs.values()))
    return result


@cache
def _only_makes(func: Any) -> bool:
    """Whether an operator returns one or several tensors, and none that is an argument."""
    schema = func._schema
    returns = {str(value.type) for value in schema.returns}
    return returns == {"Tensor"} and not any(
        value.alias_info for value in (*schema.arguments, *schema.returns)
    )


def _key(value: Any) -> Any:
    """What of an argument decides the shapes: of a tensor not its numbers; 1 is not 1.0."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.storage_offset(), value.dtype, value.device)
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return (type(value), value)


def _layouts(result: Any, arguments: Any) -> list[_Layout] | None:
    """Return what a kernel has made; None where it gave memory of its arguments, or shared it."""
    tensors = [result] if isinstance(result, Tensor) else list(result)
    if any(tensor is None for tensor in tensors):
        return None
    layouts = [_Layout(tuple(t.shape), t.stride(), t.dtype) for t in tensors]
    storages = {t.untyped_storage()._cdata for t in tensors}
    argument_storages = {t.untyped_storage()._cdata for t in tensors_in(arguments)}
    in_own_memory = len(storages) == len(tensors) and not storages & argument_storages
    fills_memory = all(
        t.untyped_storage().nbytes() == layout.nbytes
        for t, layout in zip(tensors, layouts, strict=True)
    )
    return layouts if in_own_memory and fills_memory and all(t.is_meta for t in tensors) else None


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among values and in lists of them."""
    flat: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            flat.append(value)
        elif isinstance(value, tuple | list):
            flat += tensors_in(value)
    return flat
