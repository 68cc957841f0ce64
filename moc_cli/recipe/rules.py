"""Combinations of values that cannot work together, each of them valid by itself."""

from collections.abc import Iterator
from typing import NamedTuple

from moc_cli.recipe.methods import REWRITING_INITS, MocMethod
from moc_cli.recipe.sections import Sections
from moc_cli.recipe.suggest import choices
from moc_cli.recipe.tasks import (
    BUILTIN_MODELS,
    FORMATS,
    TASKS,
    TaskKind,
    find_task,
    is_benchmark_task,
    is_packaged,
)

# Keys of `data` that are read for a custom dataset alone.
_CUSTOM = (
    *("format", "columns", "labels", "splits", "config_name", "quoting", "chat_template"),
    *("merge_system", "chat_turns", "template", "train", "validation", "test"),
)


class BrokenRule(NamedTuple):
    """A combination that cannot work: the key to look at first, why, and the other keys read.

    A rule is not reported where a key that it read is wrong by itself.
    """

    key: str
    message: str
    other_keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.key, *self.other_keys)


def broken_rules(recipe: Sections) -> Iterator[BrokenRule]:
    """Yield every combination in `recipe` that cannot work."""
    yield from _data(recipe)
    yield from _model(recipe)
    yield from _train(recipe)
    yield from _packing(recipe)
    yield from _sync(recipe)
    yield from _eval(recipe)
    yield from _compiled_generation(recipe)
    yield from _launch(recipe)


def _data(recipe: Sections) -> Iterator[BrokenRule]:
    data, suite = recipe.data, "data.suite"
    tasks = TASKS[data.suite]  # empty for a custom dataset, whose task may have any name
    for index, name in enumerate(data.tasks):
        key = f"data.tasks.{index}"
        if tasks and name not in tasks:
            message = f"suite '{data.suite}' has no task {name!r}{choices(name, tasks)}"
            yield BrokenRule(key, message, (suite,))
        elif name in data.tasks[:index]:
            yield BrokenRule(key, f"task {name!r} is listed twice", (suite,))
        elif not tasks and is_benchmark_task(name):
            message = f"{name!r} is the name of a benchmark task; give this task another name"
            yield BrokenRule(key, message, (suite,))
    if len(data.tasks) > 1 and not all(kind.joint for kind in _kinds(recipe)):
        message = f"{data.suite} trains one task per run, found {len(data.tasks)}"
        yield BrokenRule("data.tasks", message, (suite, "data.format"))
    written = data.model_dump(exclude_defaults=True)  # what is not given is absent or empty
    columns = written.get("columns", {})
    if tasks:
        if data.path is not None and is_packaged(data.suite):
            message = f"suite '{data.suite}' is inside this package; leave data.path out"
            yield BrokenRule("data.path", message, (suite,))
        for key in (key for key in _CUSTOM if written.get(key)):
            message = f"only suite 'custom' reads this key, data.suite is '{data.suite}'"
            yield BrokenRule(f"data.{key}", message, (suite,))
        return
    if data.path is None and data.train is None:
        message = "suite 'custom' needs the path of the dataset: a file, a folder or a hub id"
        yield BrokenRule("data.path", message, (suite, "data.train"))
    allowed = (
        FORMATS[data.format].columns if data.format else tuple(type(data.columns).model_fields)
    )
    for key in (key for key in columns if key not in allowed):
        message = f"format '{data.format}' has no such column; its columns are {', '.join(allowed)}"
        yield BrokenRule(f"data.columns.{key}", message, (suite, "data.format"))
    of_format = {"chat_turns": "chat", "template": "instruction"}
    if data.frame != "chat":
        of_format |= {"chat_template": "chat", "merge_system": "chat"}
    for key, format_ in of_format.items():
        if written.get(key) and data.format not in (None, format_):
            message = f"only format '{format_}' reads this key, data.format is '{data.format}'"
            if data.format == "instruction":
                message += "; data.template: chat writes such rows by the chat template"
            yield BrokenRule(f"data.{key}", message, (suite, "data.format", "data.template"))
    labels = data.labels or []
    if labels and data.format not in (None, "classification"):
        message = f"labels are for format 'classification', data.format is '{data.format}'"
        yield BrokenRule("data.labels", message, (suite, "data.format"))
    twice = [label for index, label in enumerate(labels) if label in labels[:index]]
    if twice:
        yield BrokenRule("data.labels", f"label {twice[0]!r} is listed twice", (suite,))


def _kinds(recipe: Sections) -> list[TaskKind]:
    """Return the kinds of the tasks that the suite has."""
    data, tasks = recipe.data, TASKS[recipe.data.suite]
    return [tasks[name].kind for name in data.tasks if name in tasks] if tasks else [data.kind]


def _classifier(recipe: Sections) -> TaskKind | None:
    return next((kind for kind in _kinds(recipe) if kind.classifier), None)


def _model(recipe: Sections) -> Iterator[BrokenRule]:
    name = recipe.model.model_name_or_path
    builtin = [f"builtin:{model}" for model in BUILTIN_MODELS]
    if name.startswith("builtin:") and name not in builtin:
        yield BrokenRule("model.model_name_or_path", f"found {name!r}{choices(name, builtin)}")
    yield from _quantization(recipe)
    if recipe.model.attn_implementation == "flash_attention_2":
        key, other_keys = "model.attn_implementation", ("launch.device", "train.bf16")
        if recipe.launch.device == "cpu":
            yield BrokenRule(key, "flash_attention_2 needs a GPU, launch.device is cpu", other_keys)
        elif not recipe.train.bf16:
            yield BrokenRule(key, "flash_attention_2 needs train.bf16: true", other_keys)


def _quantization(recipe: Sections) -> Iterator[BrokenRule]:
    model, four, eight = recipe.model, "model.load_in_4bit", "model.load_in_8bit"
    if model.load_in_4bit and model.load_in_8bit:
        yield BrokenRule(eight, "load_in_4bit and load_in_8bit exclude each other", (four,))
    defaults = type(model).model_fields
    for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        if not model.load_in_4bit and getattr(model, name) != defaults[name].default:
            yield BrokenRule(f"model.{name}", "only load_in_4bit: true reads this key", (four,))
    if model.load_in_8bit and recipe.method.name == "dora":
        message = "dora does not run over 8-bit weights; take load_in_4bit, or lora"
        yield BrokenRule(eight, message, ("method.name",))
    init = getattr(recipe.method, "init", "default")
    if (model.load_in_4bit or model.load_in_8bit) and init.startswith(REWRITING_INITS):
        message = f"{init} rewrites the base's weights, which are then not kept in 4 or 8 bits"
        yield BrokenRule("method.init", message, (four, eight))


def _train(recipe: Sections) -> Iterator[BrokenRule]:
    train = recipe.train
    if train.max_steps == 0:
        message = "found 0; allowed: -1 (as many as num_train_epochs gives) or at least 1"
        yield BrokenRule("train.max_steps", message)
    if train.warmup_steps > 0 and train.warmup_ratio > 0:
        message = (
            f"warmup_steps ({train.warmup_steps}) and warmup_ratio ({train.warmup_ratio}) both "
            "set the warm-up; give only one of them"
        )
        yield BrokenRule("train.warmup_ratio", message, ("train.warmup_steps",))
    if train.gradient_checkpointing and train.activation_checkpointing != "full":
        key = "train.activation_checkpointing"
        message = (
            f"found {train.activation_checkpointing!r}, but train.gradient_checkpointing: true is "
            "another name of 'full'; give only one of them"
        )
        yield BrokenRule(key, message, ("train.gradient_checkpointing",))

    if train.torch_compile and recipe.method.name == "molex":
        message = "molex runs a second layer inside a layer; leave it out, or choose moc"
        yield BrokenRule("train.torch_compile", message, ("method.name",))


def _sync(recipe: Sections) -> Iterator[BrokenRule]:
    method = recipe.method
    if not (isinstance(method, MocMethod) and method.routing.sync):
        return
    key, level = "method.routing.sync", method.routing.level
    if level != "batch":
        message = (
            f"one decision for the batches of all processes; method.routing.level is {level!r}"
        )
        yield BrokenRule(key, message, ("method.routing.level",))
    if recipe.train.torch_compile:
        message = "processes meet inside a layer, which cannot be one compiled graph then"
        yield BrokenRule(key, message, ("train.torch_compile",))


def _packing(recipe: Sections) -> Iterator[BrokenRule]:
    if not recipe.train.packing:
        return
    key, of_tasks = "train.packing", ("data.suite", "data.tasks", "data.format")
    classifier = _classifier(recipe)
    if classifier:
        message = f"a task of {classifier.name} reads each row's own output; leave packing out"
        yield BrokenRule(key, message, of_tasks)
    if recipe.method.name == "molex":
        message = "molex gives each row layers of its own; leave packing out, or choose moc"
        yield BrokenRule(key, message, ("method.name",))


def _eval(recipe: Sections) -> Iterator[BrokenRule]:
    scoring, data = recipe.eval, recipe.data
    strategy, of_tasks = "eval.eval_strategy", ("data.suite", "data.tasks", "data.format")
    if scoring.eval_strategy == "steps" and scoring.eval_steps is None:
        message = "eval_strategy 'steps' needs eval.eval_steps"
        yield BrokenRule(strategy, message, ("eval.eval_steps",))
    if scoring.eval_strategy == "no" and scoring.early_stopping_patience is not None:
        message = (
            "early stopping needs evaluation during training: set eval.eval_strategy to steps or "
            "epoch"
        )
        yield BrokenRule("eval.early_stopping_patience", message, (strategy,))
    tasks = [TASKS[data.suite][name] for name in data.tasks if name in TASKS[data.suite]]
    if data.custom and data.eval_split == "held_out":
        message = "is for benchmarks; a custom dataset names its rows: data.validation, data.splits"
        yield BrokenRule("data.eval_split", message, ("data.suite",))
    elif scoring.eval_strategy != "no" and tasks and data.holds_out and data.held_out == 0:
        message = (
            "evaluation during training needs held-out rows, found 0; give some or set "
            "eval.eval_strategy to no"
        )
        yield BrokenRule("data.held_out", message, (strategy, *of_tasks))
    classifier = _classifier(recipe)
    if scoring.protocol == "generate" and classifier:
        message = f"a task of {classifier.name} generates no answer; leave eval.protocol out"
        yield BrokenRule("eval.protocol", message, of_tasks)
    metric = scoring.metric_for_best_model
    for name in data.tasks if metric is not None else ():
        allowed = (*find_task(data.suite, name, data.format).metrics, "loss")
        if metric not in allowed:
            subject = f"task '{name}'" if tasks or not data.format else f"format '{data.format}'"
            message = f"{subject} has no {metric}; allowed: {', '.join(allowed)}"
            yield BrokenRule("eval.metric_for_best_model", message, of_tasks)
            break


def _compiled_generation(recipe: Sections) -> Iterator[BrokenRule]:
    if not recipe.eval.torch_compile:
        return
    yield from generation_rules(recipe)
    protocol, kinds = recipe.eval.protocol, _kinds(recipe)
    if kinds and not any(kind.generates(protocol) for kind in kinds):
        message = "compiles the generation of answers, and nothing is generated"
        if any(kind.generating for kind in kinds):
            message += f" with eval.protocol {protocol!r}; set that to 'generate'"
        other_keys = ("eval.protocol", "data.suite", "data.tasks", "data.format")
        yield BrokenRule("eval.torch_compile", message, other_keys)


def generation_rules(recipe: Sections) -> Iterator[BrokenRule]:
    """Yield what keeps a method's generation from being compiled."""
    method, key = recipe.method, "eval.torch_compile"
    if method.name == "molex":
        message = "molex runs a second layer inside a layer; leave it out, or choose moc"
        yield BrokenRule(key, message, ("method.name",))
    if not isinstance(method, MocMethod) or not method.top_k:
        return
    routing, reason = method.routing, "a compiled generation keeps the routes of its prompt"
    if routing.decode != "frozen":
        message = f"{reason}; method.routing.decode is {routing.decode!r}"
        yield BrokenRule(key, message, ("method.routing.decode",))
    if routing.level == "token":
        message = f"{reason}; method.routing.level is 'token'"
        yield BrokenRule(key, message, ("method.routing.level",))


def _launch(recipe: Sections) -> Iterator[BrokenRule]:
    launch, machines = recipe.launch, "launch.num_machines"
    if launch.strategy == "deepspeed":
        message = (
            "deepspeed is not supported; use fsdp2, which splits the base and the optimizer's state"
        )
        yield BrokenRule("launch.strategy", message)
    if launch.strategy == "fsdp2":
        yield from _sharded(recipe)
    if launch.machine_rank >= launch.num_machines:
        message = f"found {launch.machine_rank}; allowed: 0 to {launch.num_machines - 1}"
        yield BrokenRule("launch.machine_rank", message, (machines,))
    if launch.num_machines == 1:
        return
    if launch.main_process_ip is None:
        message = "several machines need the address of machine 0"
        yield BrokenRule("launch.main_process_ip", message, (machines,))
    if launch.main_process_port == 0:
        message = "several machines need a port that all of them know; null: 29500"
        yield BrokenRule("launch.main_process_port", message, (machines,))
    if launch.num_processes != "auto" and launch.num_processes % launch.num_machines:
        message = (
            f"{launch.num_processes} processes cannot be shared equally by {launch.num_machines} "
            "machines"
        )
        yield BrokenRule("launch.num_processes", message, (machines,))


def _sharded(recipe: Sections) -> Iterator[BrokenRule]:
    strategy = "launch.strategy"
    reasons = {
        "method.name": recipe.method.name == "molex"
        and "each process would choose other second layers",
        "train.torch_compile": recipe.train.torch_compile
        and "fsdp2 frees a layer's weights between uses, which cannot be compiled",
        "eval.torch_compile": recipe.eval.torch_compile
        and "fsdp2 frees a layer's weights between uses, which cannot be compiled",
        "model.load_in_8bit": recipe.model.load_in_8bit and "weights in 8 bits are not split",
    }
    for key, reason in reasons.items():
        if reason:
            yield BrokenRule(strategy, f"fsdp2 does not go with {key}: {reason}; use ddp", (key,))
