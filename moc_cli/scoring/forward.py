"""What every kind of scoring shares: evaluation mode, padding, positions, finite outputs."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moc_cli.data.batches import Side, pad_rows
from moc_cli.errors import DataError, MocError
from moc_cli.models.tokens import embeddings, max_positions

Progress = Callable[[int, int], None]  # items done, items in all


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[torch.device]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in.

    Yields the device of the inputs.
    """
    training = [module for module in model.modules() if module.training]
    model.train(False)
    try:
        # Not inference_mode: its tensors may be kept by a gate, and could not be trained through.
        with torch.no_grad():
            yield next(model.get_input_embeddings().parameters()).device
    finally:
        for module in training:
            module.training = True


def prompt_mask(mask: Tensor, lengths: Sequence[int]) -> Tensor:
    """Mask (B, T) of the first `lengths` tokens of each row of a padded mask."""
    limits = torch.tensor(lengths, device=mask.device).unsqueeze(1)
    return mask * (mask.cumsum(-1) <= limits)


def position_ids(mask: Tensor) -> Tensor:
    """Position ids that count only the tokens of a mask (B, T); padding gets 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def call(model: PreTrainedModel, **inputs: Any) -> Any:
    """Call the model with those of position_ids and logits_to_keep that its forward knows."""
    parameters = inspect.signature(model.forward).parameters
    optional = ("position_ids", "logits_to_keep")
    return model(**{k: v for k, v in inputs.items() if k not in optional or k in parameters})


@dataclass(frozen=True)
class Limits:
    """What a model takes: rows of at most `positions` tokens (None: of any length), and the token
    ids below `embeddings`.
    """

    positions: int | None
    embeddings: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Limits":
        """Read them from the model. It looks at every module: once a model, not once a row."""
        return cls(max_positions(model), embeddings(model))

    def check(self, rows: Sequence[Sequence[int]], text: str, new_tokens: int = 0) -> None:
        """Raise DataError where rows with `new_tokens` more each are too long, or hold other tokens
        than these.
        """
        longest = max(map(len, rows), default=0) + new_tokens
        if self.positions is not None and longest > self.positions:
            raise DataError(f"{text} has {longest} tokens, the model takes {self.positions}")
        last = max((max(row) for row in rows if row), default=0)
        if last >= self.embeddings:
            raise DataError(
                f"{text} holds the token {last}, the model has embeddings for 0 to "
                f"{self.embeddings - 1}"
            )


def check_finite(scores: Sequence[float]) -> None:
    """Raise MocError where the model's outputs are not numbers; no order of them means anything."""
    if not all(abs(score) < float("inf") for score in scores):
        raise MocError(
            "the model's outputs are not finite",
            "the run has probably diverged: lower train.learning_rate, or train in float32",
        )


def pad(
    rows: Sequence[Sequence[int]], fill: int, side: Side, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return tokens and mask (B, T): rows padded with `fill` on one side to the longest."""
    ids = pad_rows(rows, fill, side)
    mask = pad_rows([[1] * len(row) for row in rows], 0, side)
    return ids.to(device), mask.to(device)
