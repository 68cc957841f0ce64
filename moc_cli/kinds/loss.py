"""The loss of training of each kind as a sum over targets, and how many targets a batch holds."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moc_cli.data.batches import label_places
from moc_cli.models.head import Head
from moc_cli.models.masks import known_padding
from moc_cli.models.packing import bounds


class TaskLoss(ABC):
    """The loss of a model's batches, in float32."""

    why_whole: str | None = None  # why the logits of all positions are made, where that costs much

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device = model, device

    def __call__(self, batch: dict[str, Tensor], targets: int) -> Tensor:
        """Return the sum over a batch's targets, divided by `targets`; the batch is on the CPU."""
        arguments: dict[str, Any] = {**batch}
        labels = arguments.pop("labels")
        if "position_ids" in batch:  # packed rows
            arguments |= bounds(batch["position_ids"])
        inputs = {name: self._moved(value) for name, value in arguments.items()}
        with known_padding(batch.get("attention_mask")):
            return self._loss(inputs, labels, targets)

    @staticmethod
    def count_targets(labels: Tensor) -> int:
        """Return how many targets a batch's labels hold: one a row."""
        return labels.shape[0]

    @abstractmethod
    def _loss(self, inputs: dict[str, Any], labels: Tensor, targets: int) -> Tensor:
        """The same for inputs on the device and labels on the CPU."""

    def _moved(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value


class LanguageLoss(TaskLoss):
    """Cross-entropy of token t+1 at position t; labels (B, T), ignored ones left out."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model, device)
        self._head = Head(model, training=True)
        self.why_whole = self._head.reason

    @staticmethod
    def count_targets(labels: Tensor) -> int:
        """Return the number of labels that are not ignored."""
        return len(label_places(labels)[0])

    def _loss(self, inputs: dict[str, Any], labels: Tensor, targets: int) -> Tensor:
        # Chosen on the CPU and moved before the forward: nothing to wait for.
        places, label_ids = map(self._moved, label_places(labels))
        states, _ = self._head.run({**inputs, "use_cache": False})
        return self._head.loss(states, places, label_ids, targets)


class ClassLoss(TaskLoss):
    """Cross-entropy of each row's class; labels (B)."""

    def _loss(self, inputs: dict[str, Any], labels: Tensor, targets: int) -> Tensor:
        logits = self.model(**inputs).logits.float()
        return self._sum(logits, self._moved(labels)) / targets

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum")


class ScoreLoss(ClassLoss):
    """Squared error of each row's one logit; labels (B)."""

    def _sum(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum")
