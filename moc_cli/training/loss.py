"""The task's loss as a sum over targets, and how many targets a batch holds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moc_cli.data.batches import LossKind, label_places
from moc_cli.models.head import Head


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
        inputs = {
            name: tensor.to(self.device, non_blocking=True)
            for name, tensor in batch.items()
            if name != "labels"
        }
        labels = batch["labels"]
        if self.head is not None:
            places, wanted = label_places(labels)  # on the CPU: nothing to wait for
            states, _ = self.head.run({**inputs, "use_cache": False})
            return self.head.loss(states, places, wanted, targets)
        logits = self.model(**inputs).logits.float()
        labels = labels.to(self.device, non_blocking=True)
        if self.kind == "classification":
            return F.cross_entropy(logits, labels, reduction="sum") / targets
        return F.mse_loss(logits.squeeze(-1), labels.float(), reduction="sum") / targets


def count_targets(labels: Tensor, kind: LossKind) -> int:
    """Return how many targets `TaskLoss` sums over."""
    return len(label_places(labels)[0]) if kind == "causal" else labels.shape[0]
