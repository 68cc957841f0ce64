"""Classification and regression: the class of the highest logit, or the one output."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import cross_entropy, mse_loss

from moc_cli.data.batches import pad_batch
from moc_cli.data.encode import encode_pairs
from moc_cli.data.examples import PairExample
from moc_cli.methods import TextModel
from moc_cli.scoring.batch_size import BatchSize, BatchSizeOption, RowCost, run_batches
from moc_cli.scoring.forward import (
    Limits,
    Progress,
    check_finite,
    evaluating,
)


@dataclass(frozen=True)
class PairScore:
    """One sentence or pair: its label, the prediction of the same kind, and the raw outputs.

    `names` are those of the classes, where they have any.
    """

    label: int | float
    prediction: int | float
    scores: tuple[float, ...]
    names: tuple[str, ...] = ()

    def sample(self) -> dict[str, Any]:
        """Return what samples.jsonl says of the text or pair; a regression has no margin."""
        fields: dict[str, Any] = {
            "label": self.label,
            "prediction": self.prediction,
            "scores": list(self.scores),
        }
        if len(self.scores) == 1:
            return fields
        if self.names:
            fields["label_name"] = self.names[int(self.label)]
            fields["prediction_name"] = self.names[int(self.prediction)]
        best, second, *_ = sorted(self.scores, reverse=True)
        return fields | {"correct": self.prediction == self.label, "margin": best - second}


def classify(
    model: TextModel,
    examples: Sequence[PairExample],
    *,
    batch_size: BatchSizeOption | BatchSize,
    max_length: int,
    names: tuple[str, ...] = (),
    on_progress: Progress | None = None,
) -> list[PairScore]:
    """Score every example, in their order; of equal logits the first class wins.

    A model with one output is a regression. Texts are cut to `max_length` tokens as in training.
    """
    network = model.adapted.model
    encoded = encode_pairs(examples, model.tokenizer, max_length=max_length)
    Limits.of(network).check(encoded.ids, "a text, cut to data.max_length,")
    costs = [RowCost(length, copies=0) for length in encoded.lengths]
    with evaluating(network) as device:

        def work(items: list[int]) -> list[list[float]]:
            rows = [encoded.rows[item] for item in items]
            batch = pad_batch(rows, model.tokenizer, side="right")
            logits = network(**{name: value.to(device) for name, value in batch.items()}).logits
            return list(logits.float().tolist())

        outputs = run_batches(model.adapted, costs, work, size=batch_size, on_progress=on_progress)
    pairs = zip(examples, outputs, strict=True)
    return [_prediction(example, row, names) for example, row in pairs]


def pair_loss(scores: Sequence[PairScore]) -> float:
    """The mean loss of scored examples: cross-entropy, or squared error of a regression."""
    outputs = torch.tensor([score.scores for score in scores], dtype=torch.float64)
    if outputs.shape[1] == 1:
        labels = torch.tensor([score.label for score in scores], dtype=torch.float64)
        return mse_loss(outputs[:, 0], labels).item()
    return cross_entropy(outputs, torch.tensor([int(score.label) for score in scores])).item()


def _prediction(example: PairExample, outputs: list[float], names: tuple[str, ...]) -> PairScore:
    check_finite(outputs)
    prediction = outputs[0] if len(outputs) == 1 else outputs.index(max(outputs))
    return PairScore(example.label, prediction, tuple(outputs), names)
