"""A kind of task is an object: how its rows are encoded, trained on, scored and shown.

    Choice    questions with options: the commonsense suite and the builtin one
    Pairs     one text or two with a class or a score: GLUE, custom classification and regression
    Writing   texts to be written: custom instruction, chat and plain text

What can be said without torch (protocols, prompt frames, metrics to watch) is in `recipe.tasks`.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moc_cli.data.batches import LossKind
from moc_cli.data.encode import Encoded, Row
from moc_cli.errors import DataError
from moc_cli.kinds.choice import Choice
from moc_cli.kinds.pairs import Pairs
from moc_cli.kinds.writing import Writing
from moc_cli.methods import TextModel
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.tasks import FORMATS, TASKS, kind_of
from moc_cli.scoring.forward import Progress
from moc_cli.scoring.results import Evaluation, ScoringOptions

__all__ = ["Choice", "Kind", "Pairs", "Writing", "make_kind"]


class Kind(Protocol):
    """What every kind of task does. `examples` are always of this kind.

    `loss` names the loss of training. `facts` is what results.json adds on how the kind is scored.
    """

    @property
    def loss(self) -> LossKind: ...
    @property
    def facts(self) -> dict[str, Any]: ...

    def model_arguments(self) -> dict[str, Any]:
        """Return what a model is loaded as: kind, and a classifier's labels and type of problem.

        Raises DataError where a custom dataset has to be read first to know it.
        """

    def check(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise DataError naming every example that the tokenizer cannot take."""

    def encode(
        self,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        train_on_inputs: bool,
    ) -> Encoded:
        """Encode examples for training; rows are cut to `max_length` tokens."""

    def too_long(
        self,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        options: ScoringOptions,
        limit: int,
    ) -> dict[int, int]:
        """Return which examples need more than `limit` tokens to be scored, and how many each.

        An example needs its own prompt and its own output; none where texts are cut.
        """

    def has_targets(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> bool:
        """Return whether any of the examples has an answer left in `max_length` tokens."""

    def voters(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Row]:
        """Return for each example the tokens that vote on routes when it is scored."""

    def collate(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Pad rows to one batch: input_ids, attention_mask (B, T) and labels."""

    def score(
        self,
        model: TextModel,
        examples: Sequence[Any],
        options: ScoringOptions,
        on_progress: Progress | None = None,
    ) -> Evaluation:
        """Score one task's examples: every metric with its standard error."""

    def watch(
        self,
        model: TextModel,
        examples: Sequence[Any],
        options: ScoringOptions,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        """Return the numbers that training is watched by: the loss and the task's metrics."""

    def row_losses(
        self,
        model: TextModel,
        examples: Sequence[Any],
        options: ScoringOptions,
    ) -> list[float]:
        """Return the mean loss of each row's targets, without rows whose answer was cut off."""

    def prompt(self, example: Any) -> str:
        """Return the text whose hash names an item in samples.jsonl."""

    def shown_label(self, row: Row) -> int | float | str | None:
        """Return the label of an encoded row as the dry run shows it; None where tokens are it."""


def make_kind(data: DataSection) -> Kind:
    """Return the kind of the tasks that a recipe names.

    Raises DataError where the rows of a custom dataset have to be read first to know it.
    """
    name = kind_of(data.suite, data.tasks[0], data.format)
    if name is None:
        raise DataError("data.format is known only when the rows are read")
    if name == "choice":
        return Choice()
    if data.suite != "custom":
        task = TASKS[data.suite][data.tasks[0]]
        return Pairs(task.metrics, task.num_labels, task.labels)
    assert data.format is not None
    if name == "writing":
        return Writing(data.format, data.frame == "chat")
    if name == "regression":
        return Pairs(FORMATS[data.format].metrics, 1)
    return Pairs(FORMATS[data.format].metrics, len(data.labels or ()), data.labels)
