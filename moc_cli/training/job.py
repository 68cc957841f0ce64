"""A training that is ready to begin, as it goes through the session."""

from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Job:
    """A training that is ready to begin: everything is read and checked, nothing is written.

    `snapshot` is the checkpoint that it goes on from; `changes` says what differs from it.
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

    @property
    def model(self) -> TextModel:
        """The model in training, as it is scored."""
        return TextModel(self.built.adapted, self.tokenizer)
