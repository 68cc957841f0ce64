"""`moc eval` behind the door: tasks in turn, each written down as soon as it is scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from moc_cli.data.suites import check_task, load_examples, scored_splits
from moc_cli.evaluation.report import Report
from moc_cli.evaluation.suite import Protocol, Task, score_task
from moc_cli.report.progress import WorkProgress


@dataclass(frozen=True)
class Subject:
    """What is scored, and what names it in results.json."""

    adapted: Any
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Which rows are scored and how; `path` is the folder of rows, None the hub."""

    suite: str
    tasks: Sequence[str]
    path: str | None
    protocol: Protocol
    limit: int | None
    batch_size: int
    max_length: int
    base: bool = False


def read_tasks(plan: Plan) -> list[Task]:
    """Read the rows of every task; all that is wrong with names or rows is found here."""
    for name in plan.tasks:
        check_task(plan.suite, name)
    found = []
    for name in plan.tasks:
        splits = scored_splits(plan.suite, name)
        for split in splits:
            shown = name if split == splits[0] else f"{name} ({split.removeprefix('validation_')})"
            rows = load_examples(cast(Any, plan.suite), name, split, path=plan.path)
            found.append(Task.draw(shown, rows, plan.limit))
    return found


def run(
    subject: Subject, plan: Plan, tasks: Sequence[Task], folder: Path, *, silent: bool = False
) -> Report:
    """Score the tasks, and write results.json and samples.jsonl after each."""
    conditions = subject.facts | {
        "suite": plan.suite,
        "protocol": plan.protocol,
        "limit": plan.limit,
        "batch_size": plan.batch_size,
    }
    report = Report(folder, conditions)
    for task in tasks:
        with WorkProgress(task.name, len(task.examples), silent=silent) as bar:
            entry, samples = score_task(
                subject.adapted,
                subject.tokenizer,
                task,
                protocol=plan.protocol,
                batch_size=plan.batch_size,
                max_length=plan.max_length,
                base=plan.base,
                on_progress=bar.observe,
            )
        report.add(task.name, entry, samples)
    return report
