"""Scored tasks: what tables show and results.json keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from moc_cli.data.examples import Example
from moc_cli.errors import DataError
from moc_cli.recipe.tasks import ScoringProtocol, TooLong
from moc_cli.scoring.batch_size import BatchSize, BatchSizeOption
from moc_cli.scoring.generate import ExtractedAnswer
from moc_cli.scoring.metrics import Score


@dataclass(frozen=True)
class ScoringOptions:
    """How rows are scored; texts are cut to `max_length` tokens, questions are not. What becomes of
    rows that are `too_long` for the model. Whether the generation of answers is compiled.
    """

    batch_size: BatchSizeOption | BatchSize = "auto"
    max_length: int = 0
    protocol: ScoringProtocol = "rank"
    too_long: TooLong = "leave_out"
    torch_compile: bool = False


class Item(Protocol):
    """A scored row."""

    def sample(self) -> dict[str, Any]:
        """Return what samples.jsonl says of it."""


@dataclass(frozen=True)
class Evaluation:
    """A scored task: its metrics by name, the main one first, and every item.

    `seconds` is what scoring took, `batch` the batch size that was used.
    """

    task: str
    metrics: dict[str, Score]
    items: Sequence[Item]
    seconds: float
    batch: BatchSize = field(default_factory=BatchSize)

    @property
    def metric(self) -> str:
        """The metric that tables, averages and model selection use."""
        return next(iter(self.metrics))

    @property
    def main(self) -> Score:
        """The score by the main metric."""
        return self.metrics[self.metric]

    @property
    def unparsed(self) -> int | None:
        """How many generated answers hold no option word; None where none are generated."""
        answers = [item.answer for item in self.items if isinstance(item, ExtractedAnswer)]
        return answers.count(None) if answers else None

    @property
    def values(self) -> dict[str, float]:
        """The bare values by metric."""
        return {name: score.value for name, score in self.metrics.items()}

    def entry(
        self, reference: str | None = None, values: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        """Return the task's entry of results.json.

        `values` are those of the model without the method, written under the name `reference`
        (`before` or `base`); None for those that are not known.
        """
        metrics = {name: asdict(score) for name, score in self.metrics.items()}
        if reference is not None:
            for name, score in metrics.items():
                score[reference] = (values or {}).get(name)
        entry = {"metric": self.metric, "metrics": metrics, "seconds": self.seconds}
        return entry | ({} if self.unparsed is None else {"unparsed": self.unparsed})


def average(evaluations: Sequence[Evaluation]) -> float:
    """The plain mean of the tasks' main values, as the papers take it."""
    if not evaluations:
        raise DataError("no result to average")
    return sum(evaluation.main.value for evaluation in evaluations) / len(evaluations)


def single_task(examples: Sequence[Example]) -> str:
    """Return the task of the examples; raises DataError unless all are of one."""
    tasks = {example.task for example in examples}
    if len(tasks) != 1:
        raise DataError(f"one task is scored at a time, found {', '.join(sorted(tasks)) or 'none'}")
    return tasks.pop()
