"""The task's loss as a sum over targets, and how many targets a batch holds."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moc_cli.data.batches import LossKind, label_places
from moc_cli.models.head import Head
from moc_cli.models.masks import known_padding
from moc_cli.models.packing import bounds


class TaskLoss:
    """The loss of a model's batches, in float32.

    causal: cross-entropy of token t+1 at position t, labels (B, T), ignored ones left out;
    classification: cross-entropy, labels (B); regression: squared error of one logit, labels (B).
    """

    def __init__(self, model: nn.Module, kind: LossKind, device: torch.device) -> None:
        self.model, self.kind, self.device = model, kind, device
        self.head = Head(model, training=True) if kind == "causal" else None

    def __call__(self, batch: dict[str, Tensor], targets: int) -> Tensor:
        """Return the sum over a batch's targets, divided by `targets`; the batch is on the CPU."""
        given: dict[str, Any] = {**batch}
        labels = given.pop("labels")
        if "position_ids" in batch:  # packed rows
            given |= bounds(batch["position_ids"])
        inputs = {name: self._moved(value) for name, value in given.items()}
        with known_padding(batch.get("attention_mask")):
            return self._loss(inputs, labels, targets)

    def _loss(self, inputs: dict[str, Any], labels: Tensor, targets: int) -> Tensor:
        """The same for inputs on the device and labels on the CPU."""
        if self.head is not None:
            # Chosen on the CPU and moved before the forward: nothing to wait for.
            places, wanted = map(self._moved, label_places(labels))
            states, _ = self.head.run({**inputs, "use_cache": False})
            return self.head.loss(states, places, wanted, targets)
        logits = self.model(**inputs).logits.float()
        labels = self._moved(labels)
        if self.kind == "classification":
            return F.cross_entropy(logits, labels, reduction="sum") / targets
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum") / targets

    def _moved(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value


def count_targets(labels: Tensor, kind: LossKind) -> int:
    """Return how many targets `TaskLoss` sums over."""
    return len(label_places(labels)[0]) if kind == "causal" else labels.shape[0]
