"""One task of `moc eval`: its rows, how they are scored, and what is said of every item."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from transformers import PreTrainedTokenizerBase

from moc_cli.data.examples import ChoiceExample, Example, PairExample, fingerprint, subset
from moc_cli.evaluation.custom import evaluate_texts, sample_fields, sample_prompt
from moc_cli.evaluation.results_folder import prompt_hash
from moc_cli.scoring.batch_size import Asked
from moc_cli.scoring.classify import PairScore
from moc_cli.scoring.forward import Progress
from moc_cli.scoring.generate import Answer
from moc_cli.scoring.loss import TextScore
from moc_cli.scoring.rank import ItemScore
from moc_cli.scoring.results import Evaluation, evaluate_choices, evaluate_pairs

Protocol = Literal["rank", "generate", "classify", "texts"]
DRAW = 0  # which rows a limit draws does not follow any seed: runs are compared on the same rows


@dataclass(frozen=True)
class Task:
    """Rows to score: `rows` are their numbers in the split, from 0; `total` is its size."""

    name: str
    examples: list[Example]
    rows: list[int]
    total: int

    @classmethod
    def draw(cls, name: str, examples: Sequence[Example], limit: int | None) -> "Task":
        """Take all the rows of a split, or `limit` of them, the same ones in every run."""
        rows = subset(list(range(len(examples))), limit, seed=DRAW)
        return cls(name, [examples[row] for row in rows], rows, len(examples))

    @property
    def limited(self) -> bool:
        """Whether rows are left out."""
        return len(self.rows) < self.total

    @property
    def fingerprint(self) -> str:
        """Names the rows that are scored: two scores with the same one are of the same rows."""
        return fingerprint(self.examples)


@dataclass(frozen=True)
class Scoring:
    """How every task is scored; texts of a classifier are cut to `max_length` tokens."""

    protocol: Protocol
    batch_size: Asked
    max_length: int


def score(
    adapted: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    how: Scoring,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Score a task's rows."""
    if how.protocol == "texts":
        return evaluate_texts(
            adapted,
            tokenizer,
            task.examples,
            batch_size=how.batch_size,
            max_length=how.max_length,
            on_progress=on_progress,
        )
    if how.protocol == "classify":
        return evaluate_pairs(
            adapted,
            tokenizer,
            cast(list[PairExample], task.examples),
            batch_size=how.batch_size,
            max_length=how.max_length,
            on_progress=on_progress,
        )
    return evaluate_choices(
        adapted,
        tokenizer,
        cast(list[ChoiceExample], task.examples),
        batch_size=how.batch_size,
        protocol=how.protocol,
        on_progress=on_progress,
    )


def entry(task: Task, found: Evaluation) -> dict[str, Any]:
    """Return what results.json says of a scored task."""
    return metric_entries(found) | {
        "rows": task.total,
        "limited": task.limited,
        "rows_sha256": task.fingerprint,
        "batch_size": found.batch.used,
        "halved": found.batch.halved,
    }


def metric_entries(found: Evaluation) -> dict[str, Any]:
    """Return the main metric's numbers, and under `also` those of the others."""
    first, *others = (
        {
            "metric": result.metric,
            "value": result.value,
            "stderr": result.stderr,
            "majority": result.majority,
            "n": result.n,
            "seconds": result.seconds,
        }
        | ({} if result.unparsed is None else {"unparsed": result.unparsed})
        for result in found.results
    )
    return first | ({"also": others} if others else {})


def samples(task: Task, found: Evaluation, base: Evaluation | None = None) -> list[dict[str, Any]]:
    """Return the lines of samples.jsonl, the base model's item under `base`."""
    lines = [
        {"row": row, "prompt": prompt_hash(_prompt(example)), **_item(item)}
        for row, example, item in zip(
            task.rows, task.examples, cast(list[Any], found.items), strict=True
        )
    ]
    for line, item in zip(
        lines, cast(list[Any], base.items if base else ()), strict=base is not None
    ):
        line["base"] = _item(item)
    return lines


def _item(item: ItemScore | Answer | PairScore | TextScore) -> dict[str, Any]:
    if isinstance(item, TextScore):
        return sample_fields(item)
    fields: dict[str, Any] = {"label": item.label, "prediction": item.prediction}
    if isinstance(item, Answer):
        return fields | {"correct": item.correct, "output": item.output, "answer": item.answer}
    fields["scores"] = list(item.scores)
    if isinstance(item, ItemScore):
        return fields | {"correct": item.correct, "margin": item.margin}
    if len(item.scores) == 1:
        return fields
    best, second, *_ = sorted(item.scores, reverse=True)
    return fields | {"correct": item.prediction == item.label, "margin": best - second}


def _prompt(example: Example) -> str:
    if isinstance(example, ChoiceExample):
        return example.eval_prompt
    if not isinstance(example, PairExample):
        return sample_prompt(example)
    return example.text_a if example.text_b is None else f"{example.text_a}\n{example.text_b}"
