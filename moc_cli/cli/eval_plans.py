"""What `moc eval` was asked to do, made from its options and, for a run, from the run's recipe."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moc_cli.errors import MocError

if TYPE_CHECKING:
    from moc_cli.evaluation.base_scores import Known
    from moc_cli.evaluation.session import Plan, Subject
    from moc_cli.load_run import LoadedModel
    from moc_cli.recipe.schema import Recipe

OUTPUTS = Path("runs") / "eval"  # of bare models


@dataclass(frozen=True)
class Request:
    """What was asked for, as it was typed; None where nothing was."""

    model: str | None
    tasks: list[str]
    suite: str | None
    path: str | None
    protocol: str | None
    limit: int | None
    batch_size: str | None
    dtype: str | None
    device: str | None
    base: bool


@dataclass(frozen=True)
class Asked:
    """What to score and how, where the results go by default, how to load what is scored, and what
    is known of the base model already.
    """

    plan: "Plan"
    folder: Path
    load: Callable[[], "Subject"]
    known: Callable[["Subject"], "Known"]


def refuse(wrong: list[str], hint: str | None = "moc eval --help") -> None:
    if wrong:
        raise MocError("\n".join(wrong), hint)


def _task_mistakes(suite: str, names: list[str]) -> list[str]:
    """What is wrong with task names, with the suite that has them or the nearest name."""
    from moc_cli.recipe.suggest import choices
    from moc_cli.recipe.tasks import TASKS

    wrong = []
    for name in names:
        if name not in TASKS[suite]:
            homes = [other for other, tasks in TASKS.items() if name in tasks]
            hint = f"; it is one of {homes[0]}'s" if homes else choices(name, TASKS[suite])
            wrong.append(f"--tasks: {suite} has no task '{name}'{hint}")
    return wrong


def batch_size(typed: str | None, default: Any) -> Any:
    chosen = default if typed is None else typed
    return chosen if chosen == "auto" else int(chosen)


# A run


def run_asked(run: Path, request: Request) -> Asked:
    """Plan the scoring of a run; raises MocError for what does not go with its recipe."""
    from moc_cli.evaluation.base_scores import Known, before_training, earlier_evaluation
    from moc_cli.recipe.load import load_recipe
    from moc_cli.runs import RunFolder

    folder = RunFolder.open(run)
    recipe = load_recipe(folder.recipe_file)
    plan = _run_plan(recipe, request)

    def known(subject: "Subject") -> Known:
        shared = ("model", "base_weights_sha256", "dtype")
        wanted = {key: subject.facts[key] for key in shared} | plan.conditions | {"run": None}
        file = _model_folder(recipe.model.model_name_or_path, plan) / "results.json"
        before = before_training(folder, plan.options.protocol)
        return Known([*before.scores, *earlier_evaluation(file, wanted).scores])

    load = partial(run_subject, run, request.device, recipe)
    return Asked(plan, run / "eval" / plan.label, load, known)


def _run_plan(recipe: "Recipe", request: Request) -> "Plan":
    from moc_cli.evaluation.session import Plan
    from moc_cli.recipe.tasks import scoring_protocol
    from moc_cli.scoring.results import ScoringOptions

    data = recipe.data
    own = data if data.suite == "custom" else None
    usual = scoring_protocol(data.suite, data.tasks[0], data.format, recipe.eval.protocol)
    if own:
        wrong = [
            f"--tasks: the run's own task is '{own.tasks[0]}', found '{name}'"
            for name in request.tasks
            if name not in own.tasks
        ]
    else:
        wrong = _task_mistakes(data.suite, request.tasks)
    if own and request.protocol:
        wrong.append(f"--protocol {request.protocol} is for questions with options")
    if usual == "classify":
        wrong += [
            f"--tasks: the run's classifier was trained on {data.tasks[0]}, not on {name}"
            for name in request.tasks
            if name not in data.tasks and not wrong
        ]
        if request.protocol and not own:
            wrong.append(
                f"--protocol {request.protocol} is for questions; {data.suite} is classified"
            )
        if request.base:
            wrong.append("--base: a classifier's base model has no trained head to score it with")
    if data.suite == "builtin" and request.path:
        wrong.append("--path: the builtin suite is inside this package")
    refuse(wrong)
    protocol: Any = request.protocol or usual
    size = batch_size(request.batch_size, recipe.eval.per_device_eval_batch_size)
    return Plan(
        data,
        request.tasks or list(data.tasks),
        ScoringOptions(size, data.max_length, protocol),
        path=request.path,
        limit=request.limit,
        base=request.base,
    )


def run_subject(run: Path, device: str | None, recipe: "Recipe | None" = None) -> "Subject":
    from moc_cli.evaluation.session import Subject
    from moc_cli.load_run import open_run

    opened = open_run(run, device=device, recipe=recipe)
    data = opened.recipe.data
    prompted = opened.causal and data.format != "text"  # a plain text is learned as a whole
    facts = {
        "run": opened.name,
        "method": opened.recipe.method.name,
        "model": opened.recipe.model.model_name_or_path,
        "base_weights_sha256": opened.weights_hash,
        "controls_sha256": opened.adapter_config["payload_sha256"],
        "train_on_inputs": data.train_on_inputs if prompted else None,
    }
    return Subject(opened.adapted, opened.tokenizer, facts | _where(opened))


def _where(opened: "LoadedModel") -> dict[str, str]:
    """Type and device, on which the last bits of a score depend."""
    return {"dtype": opened.dtype, "device": opened.device.type}


# A bare model


def model_asked(request: Request) -> Asked:
    """Plan the scoring of a bare language model; raises MocError where it is none."""
    from moc_cli.evaluation.base_scores import Known

    assert request.model is not None
    plan = _model_plan(request)
    check_language_model(request.model)
    folder = _model_folder(request.model, plan)
    return Asked(plan, folder, partial(model_subject, request), lambda _: Known())


def _model_plan(request: Request) -> "Plan":
    from moc_cli.evaluation.session import Plan
    from moc_cli.recipe.schema import DataSection
    from moc_cli.recipe.suggest import choices
    from moc_cli.recipe.tasks import TASKS
    from moc_cli.scoring.results import ScoringOptions

    model = request.model or ""
    suite = request.suite or ("builtin" if model.startswith("builtin:") else "commonsense")
    allowed = ("commonsense", "builtin")
    if suite not in allowed:
        why = (
            "needs a trained classifier: moc eval RUN" if suite == "glue" else "is not for --model"
        )
        refuse(
            [
                f"--suite: {suite} {why}"
                if suite in TASKS
                else f"--suite: found '{suite}'{choices(suite, allowed)}"
            ]
        )
    wrong = _task_mistakes(suite, request.tasks)
    if suite == "builtin" and request.path:
        wrong.append("--path: the builtin suite is inside this package")
    refuse(wrong)
    protocol: Any = request.protocol or "rank"
    tasks = request.tasks or list(TASKS[suite])
    data = DataSection.model_validate({"suite": suite, "tasks": tasks, "path": request.path})
    options = ScoringOptions(batch_size(request.batch_size, "auto"), protocol=protocol)
    return Plan(data, tasks, options, limit=request.limit)


def check_language_model(name: str) -> None:
    """Refuse a classifier or another encoder before its weights are read."""
    from moc_cli.models.families import FAMILIES
    from moc_cli.models.load import load_config

    config = load_config(name)
    heads = [head for head in config.architectures or () if head.endswith("Classification")]
    family = FAMILIES.get(config.model_type)
    if heads or (family is not None and not family.causal):
        what = heads[0] if heads else config.model_type
        raise MocError(
            f"--model: '{name}' is no language model but {what}",
            "a classifier is scored with the head that a run trained: moc eval RUN",
        )


def model_subject(request: Request) -> "Subject":
    from moc_cli.evaluation.session import Subject
    from moc_cli.load_run import open_model

    assert request.model is not None
    opened = open_model(
        request.model, device=request.device or "auto", dtype=request.dtype or "float32"
    )
    facts = {
        "run": None,
        "method": "none",
        "model": request.model,
        "base_weights_sha256": opened.weights_hash,
    }
    return Subject(opened.adapted, opened.tokenizer, facts | _where(opened))


def _model_folder(model: str, plan: "Plan") -> Path:
    """Where a bare model's results go by default, and where a run looks for them."""
    return model_home(model) / f"{plan.data.suite}-{plan.label}"


def model_home(model: str) -> Path:
    """Where all results of a bare model go by default."""
    return OUTPUTS / re.sub("[/:]", "--", model.strip("/"))
