"""A training made ready: rows, tokenizer, model and data, checked before a file is touched.

In several processes the first one reads the rows alone: it fills the caches that the others use.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from moc_cli.methods import TextModel
from moc_cli.models.fingerprint import hash_vocabulary
from moc_cli.processes import Processes
from moc_cli.recipe.schema import Recipe
from moc_cli.report import lines
from moc_cli.scoring.results import ScoringOptions
from moc_cli.training import build
from moc_cli.training.changes import check_recipe, filled
from moc_cli.training.checkpoint import Snapshot
from moc_cli.training.compiled import matmul_precision
from moc_cli.training.device_checks import check_device_keys
from moc_cli.training.environment import describe_device
from moc_cli.training.loop_types import Settings
from moc_cli.training.memory import tensor_bytes
from moc_cli.training.resume import check_facts, check_weights, keep_place
from moc_cli.training.sharding import check_sharding, shard_layers, splits

Say = Callable[[str], None]
# Plans a run before its weights load, as `moc_cli.planning.fit` does: the recipe as it is to be
# built on the device, and the bytes of a step at most.
Forecast = Callable[
    [Recipe, build.TrainingRows, PreTrainedTokenizerBase, torch.device], tuple[Recipe, int | None]
]


@dataclass(frozen=True)
class Resume:
    """The checkpoint to go on from, and what the run folder says of the base's tensors."""

    snapshot: Snapshot
    base_tensors: Mapping[str, str]
    allow_changed_base: bool = False


@dataclass(frozen=True)
class Read:
    """The recipe with all that its rows tell, and its rows.

    `snapshot` is the checkpoint that the run goes on from; `changes` says what differs from it.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    rows: build.TrainingRows
    snapshot: Snapshot | None
    changes: list[str]


@dataclass(frozen=True)
class Job(Read):
    """A training that is ready to begin: everything is read and checked, nothing is written.

    `predicted` are the bytes that a step was planned to take at most, None where nothing was.
    """

    accelerator: Accelerator
    built: build.Built
    settings: Settings
    scoring: ScoringOptions
    identity: dict[str, Any]
    predicted: int | None

    @property
    def model(self) -> TextModel:
        """The model in training, as it is scored."""
        return TextModel(self.built.adapted, self.tokenizer)


def prepare(
    recipe: Recipe,
    accelerator: Accelerator,
    processes: Processes,
    say: Say,
    *,
    resume: Resume | None = None,
    forecast: Forecast | None = None,
) -> Job:
    """Make a job of a recipe. Everything that can be wrong is found here; joint.

    Raises MocError for what does not fit together, or to the checkpoint.
    """
    with processes.main_first():
        read = _read(recipe, accelerator.device, resume, processes.world, say)
    fitted, predicted = read.recipe, None
    if forecast is not None:
        plan = forecast
        fitted, predicted = processes.on_main(
            lambda: plan(read.recipe, read.rows, read.tokenizer, accelerator.device)
        )
    split = splits(fitted.launch, processes)
    with processes.together():
        load_on_cpu = split and not fitted.model.load_in_4bit  # may be more than a device holds
        device = torch.device("cpu") if load_on_cpu else accelerator.device
        built = build.build(fitted, device, read.tokenizer)
        _tell(read, built, say)
        identity = _identity(read, built, processes.world)
        changes = read.changes + _compare(read, built, identity, resume)
    if split:
        shard_layers(built.adapted.model, accelerator.device, processes)
    for change in changes:
        say(f"changed: {change}")
    return Job(
        **vars(replace(read, changes=changes)),
        accelerator=accelerator,
        built=built,
        settings=replace(build.make_settings(fitted), processes=processes.world),
        scoring=build.make_scoring_options(read.recipe),
        identity=identity,
        predicted=predicted,
    )


def _read(
    recipe: Recipe, device: torch.device, resume: Resume | None, world: int, say: Say
) -> Read:
    """Read the rows and all that is known without weights."""
    recipe, splits = build.read_rows(recipe)
    snapshot, changes = None, []
    if resume is not None:
        saved = resume.snapshot.identity
        processes = saved.get("processes", 1), world
        now = recipe.model_dump(mode="json")
        then = _with_columns(saved["recipe"], now["data"]["columns"])
        changes = check_recipe(then, now, processes)
        snapshot, split = keep_place(resume.snapshot, recipe, world)
        changes += split
    check_device_keys(recipe, device, training=True)
    torch.set_float32_matmul_precision(matmul_precision(device, tf32=recipe.train.tf32))
    say(lines.device_line(describe_device(device)))
    tokenizer = build.make_tokenizer(recipe.model, recipe.data.chat_template)
    shapes = build.build_shapes(recipe).model
    if recipe.launch.strategy == "fsdp2":
        check_sharding(shapes)
    rows = build.encode_rows(recipe, splits, tokenizer, shapes)
    for note in rows.notes:
        say(lines.labelled("note", note))
    return Read(recipe, tokenizer, rows, snapshot, changes)


def _with_columns(saved: dict[str, Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's recipe with columns; older ones name none."""
    data = saved["data"]
    own = filled(data.get("columns") or dict.fromkeys(columns), columns)
    return saved | {"data": data | {"columns": own}}


def _tell(read: Read, built: build.Built, say: Say) -> None:
    """Say what is trained, and on which rows."""
    counts, rows, splits = built.adapted.counts(), read.rows, read.rows.splits
    size = tensor_bytes(p for p in built.adapted.model.parameters() if not p.requires_grad)
    quantized = str(built.quantization or "")
    say(lines.model_line(built.name, counts.base, built.dtype, quantized, size))
    say(lines.method_line(read.recipe.method.name, counts))
    for line in lines.taken_lines(splits.taken):
        say(line)
    say(
        lines.rows_line(
            train=len(rows.encoded.rows),
            validation=len(splits.validation),
            scored=sum(map(len, splits.tests.values())),
            max_length=read.recipe.data.max_length,
            truncated=rows.encoded.truncated,
            answers_cut_off=rows.encoded.answers_cut_off,
            dropped=splits.dropped,
        )
    )


def _identity(read: Read, built: build.Built, world: int) -> dict[str, Any]:
    """Return what checkpoints say of the run: the recipe and hashes of what it stands for."""
    trainables = built.adapted.named_trainables()
    return {
        "recipe": read.recipe.model_dump(mode="json"),
        "weights": built.weights_hash,
        "quantization": built.quantization.arguments if built.quantization else None,
        "vocabulary": hash_vocabulary(read.tokenizer),
        "data": read.rows.splits.fingerprints(),
        "trainables": {name: list(parameter.shape) for name, parameter in trainables.items()},
        "threads": torch.get_num_threads(),
        "processes": world,
    }


def _compare(
    read: Read, built: build.Built, identity: dict[str, Any], resume: Resume | None
) -> list[str]:
    """Compare weights, rows and trainables with those of the checkpoint."""
    if resume is None:
        return []
    saved, allow = resume.snapshot.identity, resume.allow_changed_base
    model = read.recipe.model
    changes = check_weights(saved, model, built, resume.base_tensors, allow_changes=allow)
    return changes + check_facts(saved, identity, allow_changes=allow)
