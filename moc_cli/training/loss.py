"""The task's loss as a sum over targets, and how many targets a batch holds."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from moc_cli.data.batches import LossKind
from moc_cli.data.encode import IGNORED


def task_loss(outputs: Any, labels: Tensor, kind: LossKind) -> Tensor:
    """Return the summed loss of a batch, in float32.

    causal: cross-entropy of token t+1 at position t, labels (B, T), ignored ones left out;
    classification: cross-entropy, labels (B); regression: squared error of one logit, labels (B).
    """
    logits = outputs.logits
    if kind == "causal":
        targets = labels[:, 1:]
        labelled = targets != IGNORED  # (B, T-1)
        return F.cross_entropy(logits[:, :-1][labelled].float(), targets[labelled], reduction="sum")
    if kind == "classification":
        return F.cross_entropy(logits.float(), labels, reduction="sum")
    return F.mse_loss(logits.float().squeeze(-1), labels.float(), reduction="sum")


def count_targets(labels: Tensor, kind: LossKind) -> int:
    """Return how many targets `task_loss` sums over."""
    if kind == "causal":
        return int((labels[:, 1:] != IGNORED).sum())
    return labels.shape[0]
