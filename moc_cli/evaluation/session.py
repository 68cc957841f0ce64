"""`moc eval` behind the door: tasks in turn, each written down as soon as it is scored."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from moc_cli.data.custom.rows import read_scored
from moc_cli.data.suites import load_examples, scored_splits
from moc_cli.evaluation.base_scores import Known
from moc_cli.evaluation.custom import votes_of
from moc_cli.evaluation.results_folder import Report
from moc_cli.evaluation.suite import Scoring, Task, entry, metric_entries, samples, score
from moc_cli.methods import Adapted
from moc_cli.recipe.schema import DataSection
from moc_cli.report.output import say
from moc_cli.report.progress import WorkProgress
from moc_cli.scoring.results import Evaluation


@dataclass(frozen=True)
class Subject:
    """What is scored, and what names it in results.json."""

    adapted: Adapted
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Which rows are scored and how; `path` is the folder of rows, None the hub. With `base` the
    base model is scored too, on the same rows. `own` is the section of a run on one's own rows.
    """

    suite: str
    tasks: Sequence[str]
    path: str | None
    limit: int | None
    how: Scoring
    base: bool = False
    own: DataSection | None = None

    @property
    def label(self) -> str:
        """Names the conditions in a folder's name."""
        return self.how.protocol + ("" if self.limit is None else f"-limit-{self.limit}")

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers depend on, beside the subject and its rows."""
        told = {"suite": self.suite, "protocol": self.how.protocol, "limit": self.limit}
        return told | (votes_of(self.own) if self.own else {})


def read_tasks(plan: Plan) -> list[Task]:
    """Read the rows of every task; all that is wrong with the rows is found here."""
    if plan.own is not None:
        rows: list[Any] = read_scored(plan.own, plan.path)
        return [Task.draw(name, rows, plan.limit) for name in plan.tasks]
    found = []
    for name in plan.tasks:
        splits = scored_splits(plan.suite, name)
        for split in splits:
            shown = name if split == splits[0] else f"{name} ({split.removeprefix('validation_')})"
            rows = load_examples(cast(Any, plan.suite), name, split, path=plan.path)
            found.append(Task.draw(shown, rows, plan.limit))
    return found


def run(
    subject: Subject,
    plan: Plan,
    tasks: Sequence[Task],
    folder: Path,
    *,
    known: Known | None = None,
    silent: bool = False,
) -> Report:
    """Score the tasks, and write results.json and samples.jsonl after each.

    What is `known` of the base model stands beside them, unless it is scored here.
    """
    report = Report(folder, subject.facts | plan.conditions)
    if report.replaced and not silent:
        say(f"{folder}: other {', '.join(report.replaced)} than before: its scores are replaced")
    try:
        for task in tasks:
            found = _score(subject, plan, task, silent)
            bare = _score(subject, plan, task, silent, base=True) if plan.base else None
            beside = known.find(task, found) if known and not bare else None
            if bare:
                beside = metric_entries(bare) | {"source": "scored beside it"}
            told = entry(task, found) | ({"base": beside} if beside else {})
            report.add(task.name, told, samples(task, found, bare))
    except KeyboardInterrupt:
        say(f"stopped; {len(report.tasks)} scored tasks are in {report.results_file}")
        raise
    return report


def _score(
    subject: Subject, plan: Plan, task: Task, silent: bool, base: bool = False
) -> Evaluation:
    """Score one task under a progress bar; with `base` the base model."""
    label = f"{task.name} (base)" if base else task.name
    off: AbstractContextManager[None] = subject.adapted.disabled() if base else nullcontext()
    with off, WorkProgress(label, len(task.examples), silent=silent) as bar:
        return score(subject.adapted, subject.tokenizer, task, plan.how, bar.observe)
