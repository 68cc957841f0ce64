"""What every kind of scoring shares: evaluation mode, padding, positions, finiteness."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moc_cli.errors import DataError, MocError

Progress = Callable[[int, int], None]  # items done, items in all


class Scorable(Protocol):
    """Anything that holds a model; where it has routes, also a `voting(mask)`."""

    @property
    def model(self) -> PreTrainedModel: ...


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


def voting(adapted: Scorable, mask: Tensor) -> AbstractContextManager[None]:
    """Within it the tokens of mask (B, T) vote; on a bare model there is nothing to vote on."""
    vote = getattr(adapted, "voting", None)
    return nullcontext() if vote is None else vote(mask)


def positions(mask: Tensor) -> Tensor:
    """Position ids that count only the tokens of a mask (B, T); padding gets 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def call(model: PreTrainedModel, **inputs: Any) -> Any:
    """Call the model with those of position_ids and logits_to_keep that its forward knows."""
    known = inspect.signature(model.forward).parameters
    optional = ("position_ids", "logits_to_keep")
    return model(**{k: v for k, v in inputs.items() if k not in optional or k in known})


def check_fits(model: PreTrainedModel, length: int, what: str) -> None:
    """Raise DataError where `length` tokens are more than the model has positions for."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise DataError(f"{what} has {length} tokens, the model takes {limit}")


def check_finite(scores: Sequence[float]) -> None:
    """Raise MocError where the model's outputs are not numbers; no order of them means anything."""
    if not all(abs(score) < float("inf") for score in scores):
        raise MocError(
            "the model's outputs are not finite",
            "the run has probably diverged: lower train.learning_rate, or train in float32",
        )


def pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and mask (B, T), each row at the right end."""
    width = max(map(len, rows))
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return _long(ids, device), _long(mask, device)


def pad_right(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and mask (B, T), each row at the left end."""
    width = max(map(len, rows))
    ids = [row + [pad] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return _long(ids, device), _long(mask, device)


def _long(rows: list[list[int]], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.long, device=device)
