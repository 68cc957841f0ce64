"""What every kind of task does."""

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moc_cli.data.encode import Encoded, Row
from moc_cli.kinds.loss import TaskLoss
from moc_cli.methods import TextModel
from moc_cli.recipe.tasks import ModelHead, ScoringProtocol, Task
from moc_cli.scoring.batch_size import BatchSize
from moc_cli.scoring.forward import Progress
from moc_cli.scoring.metrics import Score
from moc_cli.scoring.results import Evaluation, Item, ScoringOptions, single_task

Tokenizer = PreTrainedTokenizerBase
Examples = Sequence[Any]
Observe = Progress | None  # called with the examples done and their number


class Kind(ABC):
    """What every kind of task does. `examples` are always of this kind."""

    head: ModelHead
    beams: int = 0  # with which answers are generated, where that is the protocol
    watched_by: ScoringProtocol | None = None  # in training; None: by losses of rows that are cut

    @classmethod
    def of(cls, task: Task) -> Self:
        """Return the kind of a task."""
        return cls()

    @property
    @abstractmethod
    def loss(self) -> type[TaskLoss]:
        """The loss of training."""

    @property
    def facts(self) -> dict[str, Any]:
        """What results.json adds on how the kind is scored."""
        return {}

    def model_arguments(self) -> dict[str, Any]:
        """Return what a model is loaded as: kind, and a classifier's labels and type of problem.

        Raises DataError where a custom dataset has to be read first to know it.
        """
        return {"kind": self.head.name}

    def check(self, examples: Examples, tokenizer: Tokenizer) -> list[str]:
        """Raise DataError naming every example that the tokenizer cannot take; return what it does
        not write of the others.
        """
        return []

    @abstractmethod
    def encode(
        self, examples: Examples, tokenizer: Tokenizer, *, max_length: int, train_on_inputs: bool
    ) -> Encoded:
        """Encode examples for training; rows are cut to `max_length` tokens."""

    def too_long(
        self, examples: Examples, tokenizer: Tokenizer, options: ScoringOptions, limit: int
    ) -> dict[int, int]:
        """Return which examples need more than `limit` tokens to be scored, and how many each.

        An example needs its own prompt and its own output; none where texts are cut.
        """
        return {}

    def has_targets(self, examples: Examples, tokenizer: Tokenizer, max_length: int) -> bool:
        """Return whether any of the examples has an answer left in `max_length` tokens."""
        return True

    @abstractmethod
    def voters(self, examples: Examples, tokenizer: Tokenizer, max_length: int) -> list[Row]:
        """Return for each example the tokens that vote on routes when it is scored."""

    @abstractmethod
    def collate(self, rows: Sequence[Row], tokenizer: Tokenizer) -> dict[str, Tensor]:
        """Pad rows to one batch: input_ids, attention_mask (B, T) and labels."""

    @abstractmethod
    def made_up_label(self, ids: list[int], rng: random.Random) -> Any:
        """Return the label of a row of made-up tokens, as `encode` would write it."""

    @abstractmethod
    def forward(self, model: TextModel, rows: Sequence[Row], device: torch.device) -> None:
        """Run rows through the model once, padded to the longest."""

    @abstractmethod
    def score_made_up(self, model: TextModel, rows: int, tokens: int, device: torch.device) -> None:
        """Score rows of so many made-up tokens, with the code of every evaluation."""

    def score(
        self, model: TextModel, examples: Examples, options: ScoringOptions, observe: Observe = None
    ) -> Evaluation:
        """Score one task's examples: every metric with its standard error."""
        task, size = single_task(examples), BatchSize.of(options.batch_size)
        begin = time.perf_counter()
        items = self.score_items(model, examples, replace(options, batch_size=size), observe)
        seconds = time.perf_counter() - begin
        return Evaluation(task, self.measure(items, examples), items, seconds, size)

    @abstractmethod
    def score_items(
        self, model: TextModel, examples: Examples, options: ScoringOptions, observe: Observe = None
    ) -> Sequence[Item]:
        """Return what each example's score is made of."""

    @abstractmethod
    def measure(self, items: Sequence[Any], examples: Examples) -> dict[str, Score]:
        """Return every metric of scored items, the main one first."""

    @abstractmethod
    def watch(
        self, model: TextModel, examples: Examples, options: ScoringOptions, observe: Observe = None
    ) -> dict[str, float]:
        """Return the numbers that training is watched by: the loss and the task's metrics."""

    @abstractmethod
    def row_losses(
        self, model: TextModel, examples: Examples, options: ScoringOptions
    ) -> list[float]:
        """Return the mean loss of each row's targets, without rows whose answer was cut off."""

    @abstractmethod
    def prompt(self, example: Any) -> str:
        """Return the text whose hash names an item in samples.jsonl."""

    def shown_label(self, row: Row) -> int | float | str | None:
        """Return the label of an encoded row as the dry run shows it; None where tokens are it."""
        return None
