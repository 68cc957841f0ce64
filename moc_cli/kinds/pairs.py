"""One text or two with a class or a score: a classifier with a fresh head predicts it."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from moc_cli.data.batches import pad_batch
from moc_cli.data.encode import Encoded, Row, encode_pairs
from moc_cli.data.examples import PairExample
from moc_cli.errors import DataError
from moc_cli.kinds.kind import Kind, Observe, Tokenizer
from moc_cli.kinds.loss import ClassLoss, ScoreLoss, TaskLoss
from moc_cli.methods import TextModel
from moc_cli.recipe.tasks import CLASSIFIER, Task
from moc_cli.scoring import metrics
from moc_cli.scoring.classify import PairScore, classify, pair_loss
from moc_cli.scoring.forward import evaluating
from moc_cli.scoring.metrics import Score
from moc_cli.scoring.results import ScoringOptions

Texts = Sequence[PairExample]


@dataclass(frozen=True)
class Pairs(Kind):
    """Texts or pairs of texts; every token votes.

    `metrics`: the main one first. `num_labels`: outputs of the head, 1 for a regression, 0 while
    the rows of a custom dataset are not read. `labels`: the classes, as the user wrote them.
    """

    head = CLASSIFIER

    metrics: tuple[str, ...]
    num_labels: int
    labels: Sequence[str | int] = ()

    @classmethod
    def of(cls, task: Task) -> Self:
        """Pairs with the metrics and classes of the task."""
        return cls(task.metrics, task.num_labels, task.labels)

    @property
    def loss(self) -> type[TaskLoss]:
        """Cross-entropy, or squared error for a regression."""
        return ScoreLoss if self.num_labels == 1 else ClassLoss

    def model_arguments(self) -> dict[str, Any]:
        """A classifier with a fresh head."""
        if not self.num_labels:
            raise DataError("data.labels are known only when the rows are read")
        problem = "regression" if self.num_labels == 1 else "single_label_classification"
        arguments = {"num_labels": self.num_labels, "problem_type": problem}
        names = {str(number): str(label) for number, label in enumerate(self.labels)}
        return super().model_arguments() | arguments | ({"id2label": names} if names else {})

    def encode(
        self, examples: Texts, tokenizer: Tokenizer, *, max_length: int, train_on_inputs: bool
    ) -> Encoded:
        """Encode texts or pairs, each with its one label; `train_on_inputs` has no meaning here."""
        return encode_pairs(examples, tokenizer, max_length=max_length)

    def voters(self, examples: Texts, tokenizer: Tokenizer, max_length: int) -> list[Row]:
        """All tokens that the model sees."""
        return encode_pairs(examples, tokenizer, max_length=max_length).rows

    def collate(self, rows: Sequence[Row], tokenizer: Tokenizer) -> dict[str, Tensor]:
        """Pad on the right; labels (B,)."""
        batch = pad_batch(rows, tokenizer, side=self.head.side)
        return batch | {"labels": torch.tensor([row["labels"] for row in rows])}

    def made_up_label(self, ids: list[int], rng: random.Random) -> int | float:
        """A class, or a number for a regression."""
        return float(rng.random()) if self.num_labels == 1 else rng.randrange(self.num_labels)

    def forward(self, model: TextModel, rows: Sequence[Row], device: torch.device) -> None:
        """With the logits of each row."""
        batch = pad_batch(rows, model.tokenizer, side=self.head.side)
        model.adapted.model(**{name: value.to(device) for name, value in batch.items()})

    def score_made_up(self, model: TextModel, rows: int, tokens: int, device: torch.device) -> None:
        """As texts of one length."""
        with evaluating(model.adapted.model):
            self.forward(model, [{"input_ids": [1] * tokens}] * rows, device)

    def score_items(
        self, model: TextModel, examples: Texts, options: ScoringOptions, observe: Observe = None
    ) -> list[PairScore]:
        """Classify examples."""
        return classify(
            model,
            examples,
            batch_size=options.batch_size,
            max_length=options.max_length,
            names=tuple(map(str, self.labels)),
            on_progress=observe,
        )

    def measure(self, items: Sequence[PairScore], examples: Texts) -> dict[str, Score]:
        """Each of the task's metrics."""
        labels, predictions = [i.label for i in items], [i.prediction for i in items]
        return {name: metrics.measure(name, labels, predictions) for name in self.metrics}

    def watch(
        self, model: TextModel, examples: Texts, options: ScoringOptions, observe: Observe = None
    ) -> dict[str, float]:
        """Return the loss and every metric."""
        items = self.score_items(model, examples, options, observe)
        labels, predictions = [i.label for i in items], [i.prediction for i in items]
        values = {name: metrics.METRICS[name](labels, predictions) for name in self.metrics}
        return {"loss": pair_loss(items)} | values

    def row_losses(self, model: TextModel, examples: Texts, options: ScoringOptions) -> list[float]:
        """Return each row's loss."""
        return [pair_loss([item]) for item in self.score_items(model, examples, options)]

    def prompt(self, example: PairExample) -> str:
        """The text, or both on lines of their own."""
        return example.text_a if example.text_b is None else f"{example.text_a}\n{example.text_b}"

    def shown_label(self, row: Row) -> int | float | str:
        """The class as the user wrote it, where a custom dataset has classes."""
        label: int | float = row["labels"]
        return self.labels[int(label)] if self.labels else label
