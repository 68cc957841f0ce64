"""What `moc eval` scores and how: made from its options and, for a run, from the run's recipe."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from moc_cli.data.splits import TaskRows, read_scored
from moc_cli.errors import MocError
from moc_cli.evaluation.options import EvalOptions, label_of, refuse
from moc_cli.kinds import Kind, make_kind
from moc_cli.models.families import FAMILIES
from moc_cli.models.load import load_config
from moc_cli.recipe.paths import absolute_path
from moc_cli.recipe.rules import generation_rules
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.suggest import choices
from moc_cli.recipe.tasks import TASKS, ScoringProtocol, is_packaged
from moc_cli.scoring.results import ScoringOptions

_NOT_GENERATED = "compiles the generation of answers, and nothing is generated with protocol"
OUTPUTS = Path("runs") / "eval"  # of bare models
# Suites that a bare language model can answer.
ANSWERED = tuple(
    suite
    for suite, tasks in TASKS.items()
    if any(not task.kind.classifier for task in tasks.values())
)


@dataclass(frozen=True)
class EvalJob:
    """Which rows are scored and how.

    `data` says what they are; `path` takes the place of its own, and of a custom dataset is that of
    other rows. With `base` the base model is scored too, on the same rows.
    """

    data: DataSection
    tasks: Sequence[str]
    scoring: ScoringOptions
    path: str | None = None
    limit: int | None = None
    base: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of the tasks."""
        return make_kind(self.data.task)

    @property
    def label(self) -> str:
        """Names the conditions in a folder's name."""
        return label_of(self.scoring.protocol, self.limit, self._other_rows)

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers depend on, beside the model and its rows."""
        protocol = self.scoring.protocol
        shared = {"suite": self.data.suite, "protocol": protocol, "limit": self.limit}
        return shared | {"path": absolute_path(self._other_rows)} | self.kind.facts

    @property
    def _other_rows(self) -> str | None:
        """The path of other rows than the run's; that of a benchmark is of the same ones."""
        return self.path if self.data.custom else None

    def read_rows(self) -> list[TaskRows]:
        """Read the rows of every task; all that is wrong with the rows is found here."""
        return read_scored(self.data, self.tasks, path=self.path, limit=self.limit)


def run_job(options: EvalOptions, recipe: Recipe) -> EvalJob:
    """Plan the scoring of a run; raises MocError for options that do not go with its recipe."""
    data, protocol = recipe.data, cast(ScoringProtocol | None, options.protocol)
    classifier, usual = data.kind.classifier, data.kind.protocol(recipe.eval.protocol)
    if data.custom:
        mistakes = [
            f"--tasks: the run's own task is '{data.tasks[0]}', found '{name}'"
            for name in options.tasks
            if name not in data.tasks
        ]
    else:
        mistakes = _task_mistakes(data.suite, options.tasks) or [
            f"--tasks: the run's classifier was trained on {data.tasks[0]}, not on {name}"
            for name in options.tasks
            if classifier and name not in data.tasks
        ]
    if protocol and protocol not in data.kind.protocols:
        reason = " with options" if data.custom else f"; {data.suite} is classified"
        mistakes.append(f"--protocol {protocol} is for questions{reason}")
    if classifier and options.base:
        mistakes.append("--base: a classifier's base model has no trained head to score it with")
    compiled = options.torch_compile
    if compiled:
        mistakes += [f"--torch-compile: {rule.message}" for rule in generation_rules(recipe)]
        if not data.kind.generates(protocol or usual):
            mistakes.append(f"--torch-compile: {_NOT_GENERATED} '{protocol or usual}'")
    refuse(mistakes + _path_mistakes(data.suite, options.path))
    return EvalJob(
        data,
        options.tasks or data.tasks,
        ScoringOptions(
            options.rows_per_batch(recipe.eval.per_device_eval_batch_size),
            data.max_length,
            protocol or usual,
            recipe.eval.too_long,
            recipe.eval.torch_compile if compiled is None else compiled,
        ),
        path=options.other_rows(data) if data.custom else options.path,
        limit=options.limit,
        base=options.base,
    )


def model_job(options: EvalOptions) -> EvalJob:
    """Plan the scoring of a bare language model; raises MocError for a suite or task it lacks."""
    model = options.model or ""
    suite = options.suite or ("builtin" if model.startswith("builtin:") else "commonsense")
    if suite not in TASKS:
        refuse([f"--suite: found '{suite}'{choices(suite, ANSWERED)}"])
    if suite not in ANSWERED:
        why = "needs a trained classifier: moc eval RUN" if TASKS[suite] else "is not for --model"
        refuse([f"--suite: {suite} {why}"])
    refuse(_task_mistakes(suite, options.tasks) + _path_mistakes(suite, options.path))
    tasks = list(options.tasks or TASKS[suite])
    data = DataSection.model_validate({"suite": suite, "tasks": tasks, "path": options.path})
    protocol = cast(ScoringProtocol, options.protocol or "rank")
    if options.torch_compile and not data.kind.generates(protocol):
        refuse([f"--torch-compile: {_NOT_GENERATED} '{protocol}'; add --protocol generate"])
    scoring = ScoringOptions(
        options.rows_per_batch("auto"),
        protocol=protocol,
        torch_compile=bool(options.torch_compile),
    )
    return EvalJob(data, tasks, scoring, limit=options.limit)


def check_language_model(name: str, *, trust_remote_code: bool = False) -> None:
    """Refuse a classifier or another encoder before its weights are read."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    heads = [head for head in config.architectures or () if head.endswith("Classification")]
    family = FAMILIES.get(config.model_type)
    if heads or (family is not None and not family.placement.causal):
        architecture = heads[0] if heads else config.model_type
        raise MocError(
            f"--model: '{name}' is not a language model but {architecture}",
            "a classifier is scored with the head that a run trained: moc eval RUN",
        )


def model_folder(model: str, job: EvalJob) -> Path:
    """Where a bare model's results go by default, and where a run looks for them."""
    return model_home(model) / f"{job.data.suite}-{job.label}"


def model_home(model: str) -> Path:
    """Where all results of a bare model go by default; a folder's spelling does not matter."""
    return OUTPUTS / re.sub("[/:]", "--", absolute_path(model).strip("/"))


def _task_mistakes(suite: str, names: Sequence[str]) -> list[str]:
    """What is wrong with task names, with the suite that has them or the nearest name."""
    mistakes = []
    for name in names:
        if name not in TASKS[suite]:
            homes = [home for home, tasks in TASKS.items() if name in tasks]
            hint = f"; it is one of {homes[0]}'s" if homes else choices(name, TASKS[suite])
            mistakes.append(f"--tasks: {suite} has no task '{name}'{hint}")
    return mistakes


def _path_mistakes(suite: str, path: str | None) -> list[str]:
    if path and is_packaged(suite):
        return ["--path: the builtin suite is inside this package"]
    return []
