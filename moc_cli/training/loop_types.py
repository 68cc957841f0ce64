"""What goes into the loop, what an observer sees of it, and what comes out."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from moc_cli.data.batches import Grouping
from moc_cli.kinds.loss import LanguageLoss, TaskLoss
from moc_cli.training.checkpoint import Counters
from moc_cli.training.memory import TrainingMemory

Evaluate = Callable[[], dict[str, float]]


@dataclass(frozen=True)
class Settings:
    """The numbers that govern the loop, with the recipe's names."""

    seed: int = 42
    num_train_epochs: float = 3.0
    max_steps: int = -1
    per_device_train_batch_size: int = 16
    gradient_accumulation_steps: int = 1  # micro-batches of each process
    processes: int = 1
    routing_sync: bool = False  # the processes vote together
    activation_checkpointing: str = "none"
    torch_compile: bool = False
    group_by_length: Grouping = True
    optim: str = "adamw"
    learning_rate: float = 3e-4
    gate_learning_rate: float | None = None  # None: as all others
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8
    max_grad_norm: float = 1.0  # 0: no clipping
    lr_scheduler_type: str = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    logging_steps: int = 10
    eval_strategy: str = "no"
    eval_steps: int | None = None
    metric: str | None = None  # what decides which checkpoint is the best
    patience: int | None = None
    save_strategy: str = "no"
    save_steps: int = 500

    @property
    def window(self) -> int:
        """Micro-batches of one optimizer step, over all processes."""
        return self.gradient_accumulation_steps * self.processes


class Epochs(Protocol):
    """Lists of row numbers, a pure function of the epoch."""

    def epoch(self, number: int, /) -> list[list[int]]:
        """Return the micro-batches of an epoch, counted from 0."""


@dataclass(frozen=True)
class Data:
    """What to train on: `collate` turns row numbers into CPU tensors with `labels`."""

    batches: Epochs
    collate: Callable[[list[int]], dict[str, Tensor]]
    loss: type[TaskLoss] = LanguageLoss
    padding_share: float = 0.0  # expected, of an epoch's token slots
    positions: tuple[int, int] = (0, 0)  # an epoch's token slots, padded and packed


@dataclass(frozen=True)
class StepReport:
    """What an observer sees after each step; numbers count from the run's first step."""

    step: int
    loss: float
    examples: int
    tokens: int
    seconds: float
    memory: int


@dataclass(frozen=True)
class Outcome:
    """How training ended: `finished` all its steps, or stopped `early` for want of progress."""

    stopped: str
    counters: Counters
    epochs: float
    padding_share: float
    memory: TrainingMemory


def total_steps(settings: Settings, batches: Epochs) -> int:
    """Return how many optimizer steps the run takes; `max_steps` wins over epochs."""
    if settings.max_steps > 0:
        return settings.max_steps
    per_epoch = math.ceil(len(batches.epoch(0)) / settings.window)
    return max(1, math.ceil(settings.num_train_epochs * per_epoch))


def warmup_steps(settings: Settings, total: int) -> int:
    """Return how many of `total` steps the learning rate rises."""
    return settings.warmup_steps or math.ceil(total * settings.warmup_ratio)
