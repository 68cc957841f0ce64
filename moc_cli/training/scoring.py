"""Scores of a run: every task before and after training, and a few numbers while it trains."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from moc_cli.data.encode import encode_train
from moc_cli.data.examples import ChoiceExample, Example, PairExample
from moc_cli.evaluation.custom import evaluate_texts, is_written, watch_texts
from moc_cli.scoring import metrics
from moc_cli.scoring.batch_size import Asked
from moc_cli.scoring.classify import classify, pair_loss, pair_metrics
from moc_cli.scoring.loss import lm_loss
from moc_cli.scoring.rank import rank
from moc_cli.scoring.results import (
    Evaluation,
    Protocol,
    evaluate_choices,
    evaluate_pairs,
)
from moc_cli.training.loss import Kind

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scorer:
    """A model and how to score it; while it trains, questions are ranked whatever the protocol."""

    adapted: Any
    tokenizer: PreTrainedTokenizerBase
    kind: Kind
    batch_size: Asked
    max_length: int
    protocol: Protocol = "rank"

    def score(self, examples: Sequence[Example], on_progress: Progress | None = None) -> Evaluation:
        """Score one task's examples: every metric with its standard error."""
        if is_written(examples):
            return evaluate_texts(self.adapted, self.tokenizer, examples, **self._cut(on_progress))
        if self.kind == "causal":
            return evaluate_choices(
                self.adapted,
                self.tokenizer,
                cast(Sequence[ChoiceExample], examples),
                batch_size=self.batch_size,
                protocol=self.protocol,
                on_progress=on_progress,
            )
        return evaluate_pairs(
            self.adapted,
            self.tokenizer,
            cast(Sequence[PairExample], examples),
            batch_size=self.batch_size,
            max_length=self.max_length,
            on_progress=on_progress,
        )

    def watch(
        self, examples: Sequence[Example], on_progress: Progress | None = None
    ) -> dict[str, float]:
        """Return the numbers that training is watched by: loss and the task's metrics.

        The loss of a question is that of its answer's tokens, which do not vote: a vote of theirs
        would tell earlier positions what comes. Accuracy is over all questions together.
        """
        if is_written(examples):
            return watch_texts(self.adapted, self.tokenizer, examples, **self._cut(on_progress))
        if self.kind == "causal":
            return self._watch_choices(cast(Sequence[ChoiceExample], examples), on_progress)
        return self._watch_pairs(cast(Sequence[PairExample], examples), on_progress)

    def _cut(self, on_progress: Progress | None) -> dict[str, Any]:
        """Return how texts are scored."""
        return {
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "on_progress": on_progress,
        }

    def _watch_choices(
        self, examples: Sequence[ChoiceExample], on_progress: Progress | None
    ) -> dict[str, float]:
        encoded = encode_train(
            examples, self.tokenizer, max_length=self.max_length, train_on_inputs=False
        )
        loss = lm_loss(
            self.adapted,
            self.tokenizer,
            encoded,
            batch_size=self.batch_size,
            on_progress=on_progress,
        )
        items = rank(
            self.adapted,
            self.tokenizer,
            examples,
            batch_size=self.batch_size,
            on_progress=on_progress,
        )
        return {"loss": loss.loss, "accuracy": sum(item.correct for item in items) / len(items)}

    def _watch_pairs(
        self, examples: Sequence[PairExample], on_progress: Progress | None
    ) -> dict[str, float]:
        items = classify(
            self.adapted,
            self.tokenizer,
            examples,
            batch_size=self.batch_size,
            max_length=self.max_length,
            on_progress=on_progress,
        )
        labels, predictions = [i.label for i in items], [i.prediction for i in items]
        names = pair_metrics(examples[0])
        values = {name: metrics.METRICS[name](labels, predictions) for name in names}
        return {"loss": pair_loss(items)} | values


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
