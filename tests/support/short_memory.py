"""A model that runs out of memory where a batch has too many rows."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

FULL: dict[str, Callable[[], BaseException]] = {
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "python": MemoryError,
}


@contextmanager
def room_for(
    model: PreTrainedModel, rows: int, error: Callable[[], BaseException] = FULL["gpu"]
) -> Iterator[list[int]]:
    """A model whose second layer finds no memory for more than `rows` rows; yields the sizes tried.

    It fails in the middle of a forward, after the first layer's sites have read and written.
    """
    tried: list[int] = []
    layers = model.model.layers if hasattr(model, "model") else model.bert.encoder.layer

    def check(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        tried.append(len(hidden))
        if len(hidden) > rows:
            raise error()

    handle = layers[1].register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield tried
    finally:
        handle.remove()
