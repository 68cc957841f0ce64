"""A training that is ready to begin, as it goes through the session."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from moc_cli.data.splits import Splits
from moc_cli.methods import TextModel
from moc_cli.recipe.schema import Recipe
from moc_cli.scoring.results import ScoringOptions
from moc_cli.training import build
from moc_cli.training.checkpoint import Snapshot
from moc_cli.training.loop_types import Settings

Values = dict[str, dict[str, float]]  # task -> metric -> value


class Forecast(Protocol):
    """Plans a run on its device, before its weights load; `moc_cli.planning.fit` has it."""

    def __call__(
        self,
        recipe: Recipe,
        rows: build.TrainingRows,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> tuple[Recipe, int | None]:
        """Return the recipe as it is to be built, and the bytes of a step at most."""


@dataclass(frozen=True)
class Job:
    """A training that is ready to begin: everything is read and checked, nothing is written.

    `snapshot` is the checkpoint that it goes on from; `changes` says what differs from it.
    `predicted` are the bytes that a step was planned to take at most, None where nothing was.
    """

    recipe: Recipe
    splits: Splits
    accelerator: Accelerator
    tokenizer: PreTrainedTokenizerBase
    built: build.Built
    rows: build.TrainingRows
    settings: Settings
    scoring: ScoringOptions
    identity: dict[str, Any]
    snapshot: Snapshot | None
    changes: list[str]
    predicted: int | None = None

    @property
    def model(self) -> TextModel:
        """The model in training, as it is scored."""
        return TextModel(self.built.adapted, self.tokenizer)
