"""How many rows a batch: as asked, or what free memory suggests; halved where that was too much.

The estimate counts what grows with the rows: the key-value cache, one layer's activations and the
logits. Weights are there already. Half of the free memory is left for what it does not count.
"""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from transformers import PreTrainedModel

from moc_cli.errors import MocError
from moc_cli.report.output import say

T = TypeVar("T")
Asked = int | Literal["auto"]
# Beyond these more rows make nothing faster: they are only padded to longer ones.
MOST = {"cpu": 16, "cuda": 256}
_FULL = ("can't allocate memory", "not enough memory", "out of memory")  # what torch says of it


@dataclass
class BatchSize:
    """Rows a batch: those `asked` for, those last `used`, and how often they were `halved`."""

    asked: Asked = "auto"
    used: int = 0
    halved: int = 0


@dataclass(frozen=True)
class Shape:
    """What one row takes: its tokens, then `new` ones in each of `copies`, and of how many of its
    tokens the logits are kept.
    """

    tokens: int
    new: int = 0
    copies: int = 1
    logits: int = 1


def run_batches(
    model: PreTrainedModel,
    shapes: Sequence[Shape],
    work: Callable[[list[int]], list[T]],
    *,
    size: Asked | BatchSize,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """Do `work` on item numbers, in batches of like length, and return its results by item.

    The longest come first, where memory peaks. A batch that does not fit is halved and done again,
    and so are all after it; `size` tells. Raises MocError where one row alone does not fit.
    """
    size = size if isinstance(size, BatchSize) else BatchSize(size)
    order = sorted(range(len(shapes)), key=lambda item: (-shapes[item].tokens, item))
    if order:
        size.used = _first_size(model, shapes[order[0]], size.asked)
    found: dict[int, T] = {}
    while len(found) < len(order):
        items = order[len(found) : len(found) + size.used]
        done = _try(work, items)
        if done is None:
            _free()
            _halve(size, len(items), shapes[items[0]].tokens)
            continue
        found |= dict(zip(items, done, strict=True))
        if on_progress is not None:
            on_progress(len(found), len(order))
    return [found[item] for item in range(len(order))]


def row_bytes(model: PreTrainedModel, shape: Shape) -> int:
    """Estimate the bytes that one row takes; rotary tables and the like are not counted."""
    config: Any = model.config.get_text_config()
    heads: int = config.num_attention_heads
    width: int = config.hidden_size
    vocabulary: int = config.vocab_size
    number = torch.empty((), dtype=model.dtype).element_size()
    inner = getattr(config, "intermediate_size", None) or 4 * width
    groups = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    slots = shape.tokens + shape.copies * (shape.tokens + shape.new)  # the copies, beside the first
    cache: int = 2 * config.num_hidden_layers * groups * head * number * slots
    # A layer's states and gate (in float32), its FFN, and its scores where they are not fused.
    layer = shape.tokens * (8 * width * 4 + 3 * inner * number + heads * shape.tokens * number)
    logits = 3 * shape.copies * shape.logits * vocabulary * 4
    return cache + layer + logits


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be had on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds in reserve is taken from the device, but not from us.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(_available(), _left_in_group())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was short: a GPU's, torch's on a CPU, or Python's own."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _FULL)


def _first_size(model: PreTrainedModel, longest: Shape, asked: Asked) -> int:
    if asked != "auto":
        return asked
    device = next(model.parameters()).device
    fitting = free_bytes(device) // 2 // max(1, row_bytes(model, longest))
    return max(1, min(MOST.get(device.type, MOST["cpu"]), fitting))


def _try(work: Callable[[list[int]], list[T]], items: list[int]) -> list[T] | None:
    """Do the work; None where memory was short. The error goes, and with it what it holds."""
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _halve(size: BatchSize, rows: int, tokens: int) -> None:
    if rows == 1:
        raise MocError(
            f"one row of {tokens} tokens does not fit in memory",
            "free some memory, use another device, or load the model in bfloat16",
        )
    size.used = rows // 2
    size.halved += 1
    say(f"{rows} rows of up to {tokens} tokens do not fit in memory: going on with {size.used}")


def _available() -> int:
    """Memory that the system could give, without swapping where it tells that."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: half of all there is
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _left_in_group() -> int:
    """What the limit of a container leaves; as good as endless where there is none."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
    except (OSError, ValueError):
        return 2**63
    return 2**63 if limit == "max" else max(0, int(limit) - used)
