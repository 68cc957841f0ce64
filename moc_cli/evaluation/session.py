"""`moc eval` behind the door: tasks in turn, each written down as soon as it is scored."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moc_cli.data.splits import TaskRows, read_scored
from moc_cli.evaluation.base_scores import Known
from moc_cli.evaluation.results_folder import Report, prompt_hash
from moc_cli.kinds import Kind, make_kind
from moc_cli.methods import Adapted
from moc_cli.recipe.schema import DataSection
from moc_cli.report.output import say
from moc_cli.report.progress import WorkProgress
from moc_cli.scoring.results import Evaluation, ScoringOptions


@dataclass(frozen=True)
class Subject:
    """What is scored, and what names it in results.json."""

    adapted: Adapted
    tokenizer: PreTrainedTokenizerBase
    facts: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Which rows are scored and how; `path` takes the place of the section's. With `base` the base
    model is scored too, on the same rows.
    """

    data: DataSection
    tasks: Sequence[str]
    options: ScoringOptions
    path: str | None = None
    limit: int | None = None
    base: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of the tasks."""
        return make_kind(self.data)

    @property
    def label(self) -> str:
        """Names the conditions in a folder's name."""
        limit = "" if self.limit is None else f"-limit-{self.limit}"
        return self.options.protocol + limit

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers depend on, beside the subject and its rows."""
        protocol = self.options.protocol
        shared = {"suite": self.data.suite, "protocol": protocol, "limit": self.limit}
        return shared | self.kind.facts

    def read_rows(self) -> list[TaskRows]:
        """Read the rows of every task; all that is wrong with the rows is found here."""
        return read_scored(self.data, self.tasks, path=self.path, limit=self.limit)


def run(
    subject: Subject,
    plan: Plan,
    tasks: Sequence[TaskRows],
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
            base: Mapping[str, float] | None
            if bare:
                base, source = bare.values, "scored beside it"
            elif earlier := known.find(task, found) if known else None:
                base, source = earlier.values, earlier.source
            else:
                base, source = None, None
            told = entry(task, found, base, source)
            report.add(task.name, told, samples(plan.kind, task, found, bare))
    except KeyboardInterrupt:
        say(f"stopped; {len(report.tasks)} scored tasks are in {report.results_file}")
        raise
    return report


def _score(
    subject: Subject, plan: Plan, task: TaskRows, silent: bool, base: bool = False
) -> Evaluation:
    """Score one task under a progress bar; with `base` the base model."""
    label = f"{task.name} (base)" if base else task.name
    off: AbstractContextManager[None] = subject.adapted.disabled() if base else nullcontext()
    with off, WorkProgress(label, len(task.examples), silent=silent) as bar:
        return plan.kind.score(
            subject.adapted, subject.tokenizer, task.examples, plan.options, bar.observe
        )


def entry(
    task: TaskRows,
    evaluation: Evaluation,
    base: Mapping[str, float] | None,
    base_source: str | None,
) -> dict[str, Any]:
    """Return what results.json says of a scored task, beside the base model where it is known."""
    scored = evaluation.entry() if base is None else evaluation.entry("base", base)
    return (
        scored
        | {
            "rows": task.total,
            "limited": task.limited,
            "rows_sha256": task.fingerprint,
            "batch_size": evaluation.batch.used,
            "halved": evaluation.batch.halved,
        }
        | ({} if base is None else {"base_source": base_source})
    )


def samples(
    kind: Kind, task: TaskRows, found: Evaluation, base: Evaluation | None = None
) -> list[dict[str, Any]]:
    """Return the lines of samples.jsonl, the base model's item under `base`."""
    lines = [
        {"row": row, "prompt": prompt_hash(kind.prompt(example)), **item.sample()}
        for row, example, item in zip(task.rows, task.examples, found.items, strict=True)
    ]
    for line, item in zip(lines, base.items if base else (), strict=base is not None):
        line["base"] = item.sample()
    return lines
