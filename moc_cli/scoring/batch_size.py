"""The rows in a batch: as given, or what free memory suggests; halved where that was too many.

The estimate counts what grows with the rows: the key-value cache, one layer's activations and the
logits. Weights are loaded already. Half of the free memory is left for what it does not count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from transformers import PreTrainedModel

from moc_cli.errors import MocError
from moc_cli.report.output import say

T = TypeVar("T")
BatchSizeOption = int | Literal["auto"]
# Beyond these more rows make nothing faster: they are only padded to longer ones.
LARGEST = {"cpu": 16, "cuda": 256}


@dataclass
class BatchSize:
    """Rows in a batch: the `option` given, the number last `used`, how often it was `halved`."""

    option: BatchSizeOption = "auto"
    used: int = 0
    halved: int = 0


@dataclass(frozen=True)
class RowCost:
    """What one row takes: its tokens, then `new` tokens in each of `copies` rows of the cache, and
    of how many of its tokens the logits are kept. Without copies there is no cache.
    """

    tokens: int
    new: int = 0
    copies: int = 1
    logits: int = 1


def run_batches(
    model: PreTrainedModel,
    costs: Sequence[RowCost],
    work: Callable[[list[int]], list[T]],
    *,
    size: BatchSizeOption | BatchSize,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """Do `work` on item numbers, in batches of similar length; return its results by item.

    The longest items come first, where memory peaks. A batch that does not fit in memory is halved
    and done again, and so are all after it: a message says so, and `size` counts. Raises MocError
    where a single row does not fit.
    """
    size = size if isinstance(size, BatchSize) else BatchSize(size)
    order = sorted(range(len(costs)), key=lambda item: (-costs[item].tokens, item))
    if order:
        size.used = _first_size(model, costs[order[0]], size.option)
    results: dict[int, T] = {}
    while len(results) < len(order):
        items = order[len(results) : len(results) + size.used]
        values = _unless_out_of_memory(work, items)
        if values is None:
            _halve(size, len(items), costs[items[0]].tokens)
            continue
        results |= zip(items, values, strict=True)
        if on_progress is not None:
            on_progress(len(results), len(order))
    return [results[item] for item in range(len(order))]


def row_bytes(model: PreTrainedModel, cost: RowCost) -> int:
    """Estimate the bytes that one row takes; rotary tables and the like are not counted."""
    config: Any = model.config.get_text_config()
    heads: int = config.num_attention_heads
    width: int = config.hidden_size
    vocabulary: int = config.vocab_size
    number = torch.empty((), dtype=model.dtype).element_size()
    inner = getattr(config, "intermediate_size", None) or 4 * width
    groups = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    slots = cost.copies and cost.tokens + cost.copies * (cost.tokens + cost.new)  # and the first
    cache: int = 2 * config.num_hidden_layers * groups * head * number * slots
    # A layer's states and gate (in float32), its FFN, and its scores where they are not fused.
    layer = cost.tokens * (8 * width * 4 + 3 * inner * number + heads * cost.tokens * number)
    logits = 3 * max(1, cost.copies) * cost.logits * vocabulary * 4
    return cache + layer + logits


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds in reserve is taken from the device, but not from us.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")  # the limit of a container, which psutil does not see
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - used))


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory of the host or of a device was short."""
    from accelerate.utils.memory import should_reduce_batch_size

    short = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return short or bool(should_reduce_batch_size(error))


def _first_size(model: PreTrainedModel, longest: RowCost, option: BatchSizeOption) -> int:
    if option != "auto":
        return option
    device = next(model.parameters()).device
    fitting = free_bytes(device) // 2 // max(1, row_bytes(model, longest))
    return max(1, min(LARGEST.get(device.type, LARGEST["cpu"]), fitting))


def _unless_out_of_memory(work: Callable[[list[int]], list[T]], items: list[int]) -> list[T] | None:
    """Do the work; None where memory was short: the error is gone with the tensors it holds."""
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _halve(size: BatchSize, rows: int, tokens: int) -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
    if rows == 1:
        raise MocError(
            f"one row of {tokens} tokens does not fit in memory",
            "free some memory, use another device, or load the model in bfloat16",
        )
    size.used = rows // 2
    size.halved += 1
    say(f"{rows} rows of up to {tokens} tokens do not fit in memory: going on with {size.used}")
