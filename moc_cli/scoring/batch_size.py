"""The rows in a batch: as given, or what free memory suggests; halved where that was too many.

The estimate counts what grows with the rows: the key-value cache, one layer's activations and the
logits. Weights are loaded already. Half of the free memory is left for what it does not count.
Several processes share the batches: those of one process, dealt out.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import psutil
import torch
from transformers import PreTrainedModel

from moc_cli import processes
from moc_cli.errors import MocError
from moc_cli.methods import Adapted
from moc_cli.report.output import say

T = TypeVar("T")
BatchSizeOption = int | Literal["auto"]
# Beyond these more rows make nothing faster: they are only padded to longer ones.
LARGEST = {"cpu": 16, "cuda": 256}


@dataclass
class BatchSize:
    """Rows in a batch: the `option` given, the number last `used`, how often it was `halved`.

    Of several processes: the smallest number, and the halvings of all.
    """

    option: BatchSizeOption = "auto"
    used: int = 0
    halved: int = 0

    @classmethod
    def of(cls, size: "BatchSizeOption | BatchSize") -> "BatchSize":
        """Return a size that counts: itself, or one of an option."""
        return size if isinstance(size, BatchSize) else cls(size)


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
    adapted: Adapted,
    costs: Sequence[RowCost],
    work: Callable[[list[int]], list[T]],
    *,
    size: BatchSizeOption | BatchSize,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[T]:
    """Do `work` on item numbers, in batches of similar length; return its results by item.

    The longest items come first, where memory peaks. A batch that does not fit in memory is halved
    and done again, and so are all after it: a message says so, and `size` counts. Recorders forget
    what they saw of it. Raises MocError where a single row does not fit.

    Joint: of several processes each works on its share of the batches, all get all results, and an
    error of one ends all. They call `on_progress` together, after each has done one batch.
    """
    size = BatchSize.of(size)
    order = sorted(range(len(costs)), key=lambda item: (-costs[item].tokens, item))
    if not order:
        return []
    group, model = processes.current(), adapted.model
    size.used = min(group.gather(_first_size(model, costs[order[0]], size.option)))
    batches = [order[first : first + size.used] for first in range(0, len(order), size.used)]
    # Each forward of a model whose weights are split over the processes needs them all: every one
    # then does all of the work, which counts in the first.
    same_batches = group.world > 1 and is_sharded(model)
    share = batches if same_batches else group.share(batches)
    own_share = _Share(costs, [item for batch in share for item in batch], size.used)
    results: dict[int, T] = {}

    def attempt(items: list[int]) -> list[T]:
        with adapted.attempt():
            return work(items)

    with group.meeting(), processes.same_work() if same_batches else nullcontext():
        while len(results) < len(order):
            done = group.collect(lambda: own_share.next_batch(attempt))
            for rank, part in enumerate(done[:1] if same_batches else done):
                results |= part.values
                size.halved += len(part.halvings)
                for halving in part.halvings:
                    say(f"process {rank}: {halving}" if group.world > 1 else halving)
            size.used = min(part.rows for part in done)
            if on_progress is not None:
                on_progress(len(results), len(order))
    return [results[item] for item in range(len(order))]


@dataclass(frozen=True)
class _Done(Generic[T]):
    """What a process has done in a round: results by item, what was halved, its rows in a batch."""

    values: dict[int, T]
    halvings: list[str]
    rows: int


class _Share:
    """The items that one process works on, in their order, `rows` at a time."""

    def __init__(self, costs: Sequence[RowCost], items: list[int], rows: int) -> None:
        self.rows = rows
        self._costs, self._remaining = costs, items

    def next_batch(self, work: Callable[[list[int]], list[T]]) -> _Done[T]:
        """Do the next batch that fits, if any is left."""
        halvings: list[str] = []
        while items := self._remaining[: self.rows]:
            values = _unless_out_of_memory(work, items)
            if values is not None:
                del self._remaining[: len(items)]
                return _Done(dict(zip(items, values, strict=True)), halvings, self.rows)
            halvings.append(self._halve(len(items), self._costs[items[0]].tokens))
        return _Done({}, halvings, self.rows)

    def _halve(self, rows: int, tokens: int) -> str:
        from accelerate.utils.memory import clear_device_cache

        clear_device_cache(garbage_collection=True)
        if rows == 1:
            raise MocError(
                f"one row of {tokens} tokens does not fit in memory",
                "free some memory, use another device, or load the model in bfloat16",
            )
        self.rows = rows // 2
        return (
            f"{rows} rows of up to {tokens} tokens do not fit in memory: going on with {rows // 2}"
        )


def is_sharded(model: PreTrainedModel) -> bool:
    """Return whether the model's weights are split over the processes, as FSDP2 does."""
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


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
    sharing = processes.current().world if device.type == "cpu" else 1  # the machine's memory
    fitting = free_bytes(device) // 2 // sharing // max(1, row_bytes(model, longest))
    return max(1, min(LARGEST.get(device.type, LARGEST["cpu"]), fitting))


def _unless_out_of_memory(work: Callable[[list[int]], list[T]], items: list[int]) -> list[T] | None:
    """Do the work; None where memory was short: the error is gone with the tensors it holds."""
    try:
        return work(items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
