"""Scored tasks: what tables show and results.json keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moc_cli.data.examples import Example
from moc_cli.errors import DataError
from moc_cli.recipe.tasks import ScoringProtocol
from moc_cli.scoring.batch_size import Asked, BatchSize


@dataclass(frozen=True)
class ScoringOptions:
    """How rows are scored; texts are cut to `max_length` tokens, questions are not."""

    batch_size: Asked = "auto"
    max_length: int = 0
    protocol: ScoringProtocol = "rank"


class Item(Protocol):
    """A scored row."""

    def sample(self) -> dict[str, Any]:
        """Return what samples.jsonl says of it."""


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task on n items: value and standard error as fractions, what the best
    constant answer would score (each None where there is no such thing), the seconds that scoring
    took, and how many generated texts held no answer (None where none are generated). A perplexity
    is no fraction.
    """

    task: str
    metric: str
    value: float
    n: int
    stderr: float | None
    majority: float | None
    seconds: float
    unparsed: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """A scored task: its results, the main metric first, the score of every item, and the batch
    size that was used.
    """

    results: tuple[TaskResult, ...]
    items: Sequence[Item]
    batch: BatchSize = field(default_factory=BatchSize)

    @property
    def main(self) -> TaskResult:
        """The result that tables, averages and model selection use."""
        return self.results[0]


def average(results: Sequence[TaskResult]) -> float:
    """The plain mean of the tasks' values, as the papers take it."""
    if not results:
        raise DataError("no result to average")
    return sum(result.value for result in results) / len(results)


def single_task(examples: Sequence[Example]) -> str:
    """Return the task of the examples; raises DataError unless all are of one."""
    tasks = {example.task for example in examples}
    if len(tasks) != 1:
        raise DataError(f"one task is scored at a time, found {', '.join(sorted(tasks)) or 'none'}")
    return tasks.pop()


def task_entries(
    after: Mapping[str, Evaluation], before: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return what results.json says of each task; `before` is what `value_entries` made."""
    entries = {}
    for name, evaluation in after.items():
        first, *others = (
            {
                "metric": result.metric,
                "before": before.get(name, {}).get(result.metric),
                "value": result.value,
                "n": result.n,
                "stderr": result.stderr,
                "majority": result.majority,
            }
            for result in evaluation.results
        )
        entries[name] = first | {"seconds": evaluation.main.seconds}
        if evaluation.main.unparsed is not None:
            entries[name]["unparsed"] = evaluation.main.unparsed
        if others:
            entries[name]["also"] = others
    return entries


def value_entries(scores: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    """Return the bare values of scores: task -> metric -> value."""
    return {
        name: {result.metric: result.value for result in evaluation.results}
        for name, evaluation in scores.items()
    }
