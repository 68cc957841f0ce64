"""Combinations of values that make no sense together, each valid by itself.

A rule names the keys it read, so that it stays silent where one of them is already wrong.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from moc_cli.recipe.suggest import choices
from moc_cli.recipe.tasks import (
    BUILTIN_MODELS,
    FORMATS,
    TASKS,
    is_benchmark_task,
    watched_metrics,
)

if TYPE_CHECKING:
    from moc_cli.recipe.schema import Recipe


class BrokenRule(NamedTuple):
    """A combination that cannot work: the key to look at first, every key read, and why."""

    key: str
    message: str
    read: tuple[str, ...]


def broken_rules(recipe: "Recipe") -> list[BrokenRule]:
    """Return every combination in `recipe` that cannot work."""
    return [
        *_tasks(recipe),
        *_custom(recipe),
        *_model(recipe),
        *_train(recipe),
        *_evaluation(recipe),
    ]


def _tasks(recipe: "Recipe") -> Iterator[BrokenRule]:
    data = recipe.data
    read = ("data.suite", "data.tasks")
    known = TASKS[data.suite]
    for index, task in enumerate(data.tasks):
        key = f"data.tasks.{index}"
        if data.suite == "custom":
            if is_benchmark_task(task):
                message = f"{task!r} is a benchmark's task; give your own another name"
                yield BrokenRule(key, message, (*read, key))
        elif task not in known:
            message = f"suite '{data.suite}' has no task {task!r}{choices(task, known)}"
            yield BrokenRule(key, message, (*read, key))
        elif task in data.tasks[:index]:
            yield BrokenRule(key, f"task {task!r} is listed twice", (*read, key))
    if data.suite in ("glue", "custom") and len(data.tasks) > 1:
        message = f"{data.suite} trains one task a run, found {len(data.tasks)}"
        yield BrokenRule("data.tasks", message, read)
    if data.suite == "builtin" and data.path is not None:
        yield BrokenRule(
            "data.path",
            "the builtin suite is inside this package; leave data.path out",
            ("data.suite", "data.path"),
        )


def _custom(recipe: "Recipe") -> Iterator[BrokenRule]:
    """Keys of one's own rows: needed there, useless elsewhere."""
    data = recipe.data
    named = {key: name for key, name in data.columns if name is not None}
    if data.suite != "custom":
        given = {"format": data.format, "columns": named, "labels": data.labels}
        for key in (key for key, value in given.items() if value):
            message = f"only suite 'custom' reads this key, data.suite is '{data.suite}'"
            yield BrokenRule(f"data.{key}", message, ("data.suite", f"data.{key}"))
        return
    if data.path is None:
        message = "suite 'custom' needs the path of your rows: a file, a folder or a hub id"
        yield BrokenRule("data.path", message, ("data.suite", "data.path"))
    used = FORMATS[data.format].columns if data.format else tuple(type(data.columns).model_fields)
    for key in (key for key in named if key not in used):
        message = f"format '{data.format}' reads no such column; it reads {', '.join(used)}"
        where = f"data.columns.{key}"
        yield BrokenRule(where, message, ("data.suite", "data.format", where))
    if data.labels is not None and data.format not in (None, "classification"):
        message = f"labels are for format 'classification', data.format is '{data.format}'"
        yield BrokenRule("data.labels", message, ("data.suite", "data.format", "data.labels"))
    labels = data.labels or []
    twice = [label for index, label in enumerate(labels) if label in labels[:index]]
    if twice:
        message = f"label {twice[0]!r} is listed twice"
        yield BrokenRule("data.labels", message, ("data.suite", "data.labels"))


def _model(recipe: "Recipe") -> Iterator[BrokenRule]:
    name = recipe.model.model_name_or_path
    builtin = [f"builtin:{model}" for model in BUILTIN_MODELS]
    if name.startswith("builtin:") and name not in builtin:
        key = "model.model_name_or_path"
        yield BrokenRule(key, f"found {name!r}{choices(name, builtin)}", (key,))
    if recipe.model.attn_implementation == "flash_attention_2":
        read = ("model.attn_implementation", "launch.device", "train.bf16")
        if recipe.launch.device == "cpu":
            yield BrokenRule(read[0], "flash_attention_2 needs a GPU, launch.device is cpu", read)
        elif not recipe.train.bf16:
            yield BrokenRule(read[0], "flash_attention_2 needs train.bf16: true", read)


def _train(recipe: "Recipe") -> Iterator[BrokenRule]:
    train = recipe.train
    if train.max_steps == 0:
        yield BrokenRule(
            "train.max_steps",
            "found 0; allowed: -1 (as many as num_train_epochs gives) or at least 1",
            ("train.max_steps",),
        )
    if train.warmup_steps > 0 and train.warmup_ratio > 0:
        yield BrokenRule(
            "train.warmup_ratio",
            f"warmup_steps ({train.warmup_steps}) and warmup_ratio ({train.warmup_ratio}) are "
            "two ways to say one thing; give only one",
            ("train.warmup_steps", "train.warmup_ratio"),
        )


def _evaluation(recipe: "Recipe") -> Iterator[BrokenRule]:
    scoring, data = recipe.eval, recipe.data
    strategy = "eval.eval_strategy"
    if scoring.eval_strategy == "steps" and scoring.eval_steps is None:
        yield BrokenRule(
            strategy,
            "eval_strategy 'steps' needs eval.eval_steps",
            (strategy, "eval.eval_steps"),
        )
    if scoring.protocol == "generate" and data.suite == "glue":
        yield BrokenRule(
            "eval.protocol",
            "glue is classified: no answer is generated; leave eval.protocol out",
            ("eval.protocol", "data.suite"),
        )
    if scoring.eval_strategy == "no" and scoring.early_stopping_patience is not None:
        yield BrokenRule(
            "eval.early_stopping_patience",
            "early stopping needs evaluation during training: set eval.eval_strategy to steps or "
            "epoch",
            (strategy, "eval.early_stopping_patience"),
        )
    if scoring.eval_strategy != "no" and data.suite == "commonsense" and data.held_out == 0:
        yield BrokenRule(
            "data.held_out",
            "evaluation during training needs held-out rows, found 0; give some or set "
            "eval.eval_strategy to no",
            (strategy, "data.suite", "data.held_out"),
        )
    metric, read = scoring.metric_for_best_model, "eval.metric_for_best_model"
    custom = data.suite == "custom"
    for task in data.tasks if metric is not None else ():
        allowed = watched_metrics(data.suite, task, data.format)
        if metric not in allowed:
            what = f"format '{data.format}'" if custom and data.format else f"task '{task}'"
            yield BrokenRule(
                read,
                f"{what} has no {metric}; allowed: {', '.join(allowed)}",
                (read, "data.suite", "data.tasks", "data.format"),
            )
            break
