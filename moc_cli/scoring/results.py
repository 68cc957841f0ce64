"""Scored tasks: what tables show and results.json keeps."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedTokenizerBase

from moc_cli.data.batches import Side
from moc_cli.data.examples import ChoiceExample, PairExample
from moc_cli.errors import DataError
from moc_cli.scoring import metrics
from moc_cli.scoring.batch_size import Asked, BatchSize
from moc_cli.scoring.classify import PairScore, classify, pair_metrics
from moc_cli.scoring.forward import Progress, Scorable
from moc_cli.scoring.generate import Answer, generate
from moc_cli.scoring.loss import TextScore
from moc_cli.scoring.rank import ItemScore, rank

Protocol = Literal["rank", "generate"]


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
    items: list[ItemScore] | list[Answer] | list[PairScore] | list[TextScore]
    batch: BatchSize = field(default_factory=BatchSize)

    @property
    def main(self) -> TaskResult:
        """The result that tables, averages and model selection use."""
        return self.results[0]


def evaluate_choices(
    adapted: Scorable,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ChoiceExample],
    *,
    batch_size: Asked,
    protocol: Protocol = "rank",
    on_progress: Progress | None = None,
) -> Evaluation:
    """Rank the options of a task's questions, or have answers generated: accuracy."""
    _check(examples)
    begin = time.perf_counter()
    size = BatchSize(batch_size)
    items: list[ItemScore] | list[Answer]
    unparsed = None
    if protocol == "generate":
        items = generate(adapted, tokenizer, examples, batch_size=size, on_progress=on_progress)
        unparsed = sum(item.answer is None for item in items)
    else:
        items = rank(adapted, tokenizer, examples, batch_size=size, on_progress=on_progress)
    seconds = time.perf_counter() - begin
    # No option (None) equals no label, as the place -1 does.
    predictions = [-1 if item.prediction is None else item.prediction for item in items]
    found = metrics.measure("accuracy", [item.label for item in items], predictions)
    best = metrics.majority_choice(examples)
    task, n = examples[0].task, len(items)
    result = TaskResult(task, "accuracy", found.value, n, found.stderr, best, seconds, unparsed)
    return Evaluation((result,), items, size)


def evaluate_pairs(
    adapted: Scorable,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[PairExample],
    *,
    batch_size: Asked,
    max_length: int,
    side: Side = "right",
    on_progress: Progress | None = None,
) -> Evaluation:
    """Classify a task's examples: each of its metrics."""
    _check(examples)
    task = examples[0].task
    begin = time.perf_counter()
    size = BatchSize(batch_size)
    items = classify(
        adapted,
        tokenizer,
        examples,
        batch_size=size,
        max_length=max_length,
        side=side,
        on_progress=on_progress,
    )
    seconds = time.perf_counter() - begin
    labels = [item.label for item in items]
    predictions = [item.prediction for item in items]
    results = []
    for metric in pair_metrics(examples[0]):
        found = metrics.measure(metric, labels, predictions)
        best = metrics.majority(metric, labels)
        results.append(
            TaskResult(task, metric, found.value, len(items), found.stderr, best, seconds)
        )
    return Evaluation(tuple(results), items, size)


def average(results: Sequence[TaskResult]) -> float:
    """The plain mean of the tasks' values, as the papers take it."""
    if not results:
        raise DataError("no result to average")
    return sum(result.value for result in results) / len(results)


def _check(examples: Sequence[ChoiceExample] | Sequence[PairExample]) -> None:
    tasks = {example.task for example in examples}
    if len(tasks) != 1:
        raise DataError(f"one task is scored at a time, found {', '.join(sorted(tasks)) or 'none'}")
