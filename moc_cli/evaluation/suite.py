"""One task of `moc eval`: score it, with the base model beside it, and describe every item."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from moc_cli.data.examples import ChoiceExample, Example, subset
from moc_cli.evaluation.classify import PairScore
from moc_cli.evaluation.forward import Progress
from moc_cli.evaluation.rank import ItemScore
from moc_cli.evaluation.report import prompt_hash
from moc_cli.evaluation.results import Evaluation, evaluate_choices, evaluate_pairs

Protocol = Literal["rank", "classify"]
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


def score_task(
    adapted: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    protocol: Protocol,
    batch_size: int,
    max_length: int,
    base: bool = False,
    on_progress: Progress | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what results.json and samples.jsonl say of a task; with `base`, of the model too."""

    def run() -> Evaluation:
        if protocol == "rank":
            return evaluate_choices(
                adapted, tokenizer, task.examples, batch_size=batch_size, on_progress=on_progress
            )
        return evaluate_pairs(
            adapted,
            tokenizer,
            task.examples,
            batch_size=batch_size,
            max_length=max_length,
            on_progress=on_progress,
        )

    found = run()
    entry = _entry(found) | {"rows": task.total, "limited": len(task.rows) < task.total}
    samples = [
        {"row": row, "prompt": prompt_hash(_prompt(example)), **_item(item)}
        for row, example, item in zip(task.rows, task.examples, found.items, strict=True)
    ]
    if base:
        with adapted.disabled():
            bare = run()
        entry["base"] = _entry(bare)
        for sample, item in zip(samples, bare.items, strict=True):
            sample["base"] = _item(item)
    return entry, samples


def _entry(found: Evaluation) -> dict[str, Any]:
    first, *others = (
        {
            "metric": result.metric,
            "value": result.value,
            "stderr": result.stderr,
            "majority": result.majority,
            "n": result.n,
            "seconds": result.seconds,
        }
        for result in found.results
    )
    return first | ({"also": others} if others else {})


def _item(item: ItemScore | PairScore) -> dict[str, Any]:
    fields = {
        "label": item.label,
        "prediction": item.prediction,
        "scores": list(item.scores),
    }
    if isinstance(item, ItemScore):
        return fields | {"correct": item.correct, "margin": item.margin}
    if len(item.scores) == 1:
        return fields
    best, second, *_ = sorted(item.scores, reverse=True)
    return fields | {"correct": item.prediction == item.label, "margin": best - second}


def _prompt(example: Example) -> str:
    if isinstance(example, ChoiceExample):
        return example.eval_prompt
    return example.text_a if example.text_b is None else f"{example.text_a}\n{example.text_b}"
