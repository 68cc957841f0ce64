"""The loss of a language model on held-out rows, on the labels it would be trained on."""

from dataclasses import dataclass
from typing import Any

import torch

from moc_cli.data.batches import collate, label_places
from moc_cli.data.encode import Encoded
from moc_cli.errors import DataError
from moc_cli.methods import TextModel
from moc_cli.models.head import Head
from moc_cli.scoring.batch_size import BatchSize, BatchSizeOption, RowCost, run_batches
from moc_cli.scoring.forward import (
    Limits,
    Progress,
    check_finite,
    evaluating,
    position_ids,
    prompt_mask,
)


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy in nats over the labelled tokens of all rows, each counting once."""

    loss: float
    tokens: int
    rows: tuple[tuple[float, int], ...] = ()  # of each row: summed loss, labelled tokens


@dataclass(frozen=True)
class TextScore:
    """One text: the summed loss of its `tokens` learned tokens, in nats; where an output was
    generated, that one as `prediction` and the right one as `label`.
    """

    loss: float
    tokens: int
    label: str | None = None
    prediction: str | None = None

    @property
    def correct(self) -> bool | None:
        """Whether the generated output is the right one; None where none was generated."""
        return None if self.label is None else self.prediction == self.label

    def sample(self) -> dict[str, Any]:
        """Return what samples.jsonl says of the text."""
        fields: dict[str, Any] = {"loss": self.loss, "tokens": self.tokens}
        if self.label is None:
            return fields
        output = {"label": self.label, "prediction": self.prediction, "correct": self.correct}
        return fields | output


def lm_loss(
    model: TextModel,
    encoded: Encoded,
    *,
    batch_size: BatchSizeOption | BatchSize,
    on_progress: Progress | None = None,
) -> HeldOutLoss:
    """Compute the loss of encoded rows; only tokens of their prompts vote on routes.

    Raises DataError where no token is labelled.
    """
    network = model.adapted.model
    Limits.of(network).check(encoded.ids, "a row, cut to data.max_length,")
    head = Head(network)
    costs = [
        RowCost(length, copies=0, logits=length if head.reason else 0) for length in encoded.lengths
    ]
    with evaluating(network) as device:

        def work(items: list[int]) -> list[tuple[float, int]]:
            rows = [encoded.rows[item] for item in items]
            batch = collate(rows, model.tokenizer, side="left")
            labels = batch.pop("labels")
            places, targets = label_places(labels)
            owners = places // labels.shape[1]
            inputs: dict[str, Any] = {name: value.to(device) for name, value in batch.items()}
            mask = inputs["attention_mask"]
            voters = prompt_mask(mask, [encoded.prompt_lengths[item] for item in items])
            with model.adapted.voting(voters):
                extra_inputs = {"position_ids": position_ids(mask), "use_cache": False}
                states, _ = head.run(inputs | extra_inputs)
            log_probs, _ = head.log_probs(states, places, targets[:, None])
            losses = torch.zeros(len(rows), dtype=torch.float64)
            losses.index_add_(0, owners, -log_probs[:, 0].double().cpu())
            counts = owners.bincount(minlength=len(rows))
            return list(zip(losses.tolist(), counts.tolist(), strict=True))

        losses = run_batches(model.adapted, costs, work, size=batch_size, on_progress=on_progress)
    total, tokens = sum(loss for loss, _ in losses), sum(count for _, count in losses)
    if tokens == 0:
        raise DataError(
            "no held-out row has a labelled token",
            "raise data.max_length so that the answers are not cut off",
        )
    check_finite([total])
    return HeldOutLoss(total / tokens, tokens, tuple(losses))
