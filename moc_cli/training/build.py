"""From a recipe's sections to the objects a run needs: device, tokenizer, model, settings."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.adapter.check import check_modules
from moc_cli.data.batches import Batches, as_tensors
from moc_cli.data.custom.chat import set_template
from moc_cli.data.encode import Encoded
from moc_cli.data.examples import Example
from moc_cli.data.packing import pack
from moc_cli.data.row_cache import encode_cached
from moc_cli.data.splits import Splits, read_splits
from moc_cli.errors import DataError
from moc_cli.kinds import Kind, make_kind
from moc_cli.methods import Adapted, attach
from moc_cli.models.fingerprint import fingerprint
from moc_cli.models.load import (
    Loaded,
    build_meta,
    load_config,
    load_model,
    load_tokenizer,
)
from moc_cli.models.packing import attend_by_row, check_packing
from moc_cli.models.stored_weights import find_stored
from moc_cli.models.tokens import compare_tokens
from moc_cli.models.weight_files import checkpoint_shapes, own_head
from moc_cli.recipe.methods import MocMethod, MolexMethod
from moc_cli.recipe.model import ModelSection
from moc_cli.recipe.quantization import Quantization, asked_for
from moc_cli.recipe.rules import broken_rules
from moc_cli.recipe.schema import Recipe
from moc_cli.scoring.results import ScoringOptions
from moc_cli.training import checks
from moc_cli.training.loop_types import Data, Settings
from moc_cli.training.recompute import check_recompute, prepare_layers, recompute_mode


@dataclass(frozen=True)
class Built:
    """A model with a method in it, on its device; its name; what its base is, see `Loaded`."""

    adapted: Adapted
    name: str
    dtype: str
    weights_hash: str
    fingerprint: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None


@dataclass(frozen=True)
class TrainingRows:
    """The kind of task, its encoded training rows, and the same as the loop takes them. `splits`
    are the rows of all parts that are used, `learned` those of training with something to learn.

    `notes` say how settings of model, tokenizer and rows were understood that have two meanings.
    """

    kind: Kind
    splits: Splits
    learned: list[Example]
    encoded: Encoded
    data: Data
    notes: list[str] = field(default_factory=list)


def make_tokenizer(
    model: ModelSection, chat_template: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that the recipe names, or the model's own, with the chat template of its
    rows."""
    is_of_model = model.tokenizer_name is None
    tokenizer = load_tokenizer(
        model.tokenizer_name or model.model_name_or_path,
        revision=model.revision if is_of_model else None,
        trust_remote_code=model.trust_remote_code,
    )
    set_template(tokenizer, chat_template)
    return tokenizer


def read_rows(recipe: Recipe) -> tuple[Recipe, Splits]:
    """Read the rows that the recipe names; return it with all that they tell, and them.

    A custom dataset tells its format, its columns and its labels, where the recipe does not. Raises
    DataError for rows that cannot be used, or that do not go with the rest of the recipe.
    """
    data, splits = read_splits(
        recipe.data,
        max_test=recipe.eval.max_samples,
        watched=recipe.eval.eval_strategy != "no",
    )
    if data is recipe.data:
        return recipe, splits
    recipe = recipe.model_copy(update={"data": data})
    broken = list(map(str, broken_rules(recipe)))
    if recipe.eval.eval_strategy != "no" and not splits.validation:
        broken.append(
            "eval.eval_strategy: evaluation during training needs a validation file, or "
            "data.held_out above 0"
        )
    if broken:
        raise DataError("\n".join(broken))
    return recipe, splits


def encode_rows(
    recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> TrainingRows:
    """Encode the training rows and cut them into batches; only the model's shapes are read.

    Raises DataError for examples of any part that the tokenizer or the model cannot take, and where
    no row has an answer left.
    """
    data = recipe.data
    kind = make_kind(data.task)
    notes = checks.match(data, model, tokenizer) + compare_tokens(model, tokenizer)
    notes += checks.watched_rows(recipe, splits)
    heads = _own_head(recipe, model)
    if heads:
        section = recipe.model
        config = load_config(
            section.model_name_or_path,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
        config_labels, labels = config.id2label or {}, model.config.id2label or {}
        notes.append(checks.head_note(recipe, heads, config_labels, labels))
    notes += kind.check(splits.all_examples, tokenizer) + checks.logits_note(kind, model)
    encoded, encode_notes = _encode(recipe, kind, splits, tokenizer)
    notes += encode_notes
    problems = checks.problems(data, model, tokenizer, encoded.ids)
    if problems:
        raise DataError("\n".join(problems))
    scoring = make_scoring_options(recipe)
    splits, long = checks.leave_out_long(kind, splits, tokenizer, model, scoring)
    encoded, splits, learned = checks.leave_out_empty(encoded, splits, data.max_length)
    loop_data = make_data(recipe, kind, encoded, tokenizer)
    return TrainingRows(kind, splits, learned, encoded, loop_data, notes + long)


def _encode(
    recipe: Recipe, kind: Kind, splits: Splits, tokenizer: PreTrainedTokenizerBase
) -> tuple[Encoded, list[str]]:
    """Encode the training rows, or take them from the cache; say which."""
    data = recipe.data
    arguments: dict[str, Any] = {
        "max_length": data.max_length,
        "train_on_inputs": data.train_on_inputs,
    }
    encode = partial(kind.encode, splits.train, tokenizer, **arguments)
    facts = arguments | {"kind": type(kind).__name__} | vars(kind)
    encoded, note = encode_cached(encode, splits.train, tokenizer, facts)
    return encoded, [note] if note else []


def make_data(
    recipe: Recipe, kind: Kind, encoded: Encoded, tokenizer: PreTrainedTokenizerBase
) -> Data:
    """Cut encoded rows into the batches that the loop takes."""
    batches = Batches(
        encoded.lengths,
        recipe.train.per_device_train_batch_size,
        seed=recipe.seed,
        group_by_length=recipe.train.group_by_length,
    )
    rows, packing = list(map(as_tensors, encoded.rows)), recipe.train.packing

    def collate(numbers: list[int]) -> dict[str, Any]:
        chosen = [rows[number] for number in numbers]
        return pack(chosen) if packing else kind.collate(chosen, tokenizer)

    share = 0.0 if packing else batches.padding_share()
    return Data(batches, collate, kind.loss, share, batches.positions())


def build(recipe: Recipe, device: torch.device, tokenizer: PreTrainedTokenizerBase) -> Built:
    """Load the model in its precision, place the method in it, and move both to the device.

    Model and tokenizer then agree on padding and end tokens.
    """
    loaded = load_model(
        recipe.model.model_name_or_path,
        seed=recipe.seed,
        device=device,
        unquantized=recipe.train.modules or (),
        split=recipe.launch.strategy == "fsdp2",
        **_arguments(recipe),
    )
    checks.match(recipe.data, loaded.model, tokenizer)
    return place_method(recipe, loaded, device)


def place_method(recipe: Recipe, loaded: Loaded, device: torch.device) -> Built:
    """Place the method in a model, and move both to the device."""
    modules = _trained_modules(recipe, loaded.model, loaded.new_modules)
    base_print = loaded.fingerprint
    if modules != loaded.new_modules:
        stored = find_stored(loaded.model, loaded.source, recipe.model.revision)
        base_print = fingerprint(loaded.model, modules, stored)
    if recipe.train.packing:
        attend_by_row(loaded.model)
    adapted = attach(loaded.model, recipe.method, new_modules=modules, seed=recipe.seed)
    prepare_layers(loaded.model, recipe)
    loaded.model.to(device)  # type: ignore[arg-type]
    return Built(
        adapted,
        recipe.model.model_name_or_path,
        str(loaded.model.dtype).removeprefix("torch."),
        loaded.weights_hash,
        base_print,
        loaded.tensors,
        loaded.quantization,
    )


def base_facts(recipe: Recipe, built: Built) -> dict[str, Any]:
    """Return what adapter_config.json says about the base and how the method was placed in it."""
    model = recipe.model
    return {
        "base_model_name_or_path": model.model_name_or_path,
        "revision": model.revision,
        "base_weights_sha256": built.weights_hash,
        "base_fingerprint": built.fingerprint,
        "base_quantization": built.quantization.arguments if built.quantization else None,
        **make_kind(recipe.data.task).model_arguments(),
        "seed": recipe.seed,
    }


def build_shapes(recipe: Recipe) -> Adapted:
    """Place the method in the model's shapes alone, on the meta device; no weights are read.

    Whether the checkpoint lacks more than a classifier's head is seen only on loading.
    """
    return place_in_shapes(recipe, base_shape(recipe))


def place_in_shapes(recipe: Recipe, model: PreTrainedModel) -> Adapted:
    """Place the method in shapes of the recipe's model, of all its layers or of some."""
    modules = _trained_modules(recipe, model, fresh_modules(recipe, model))
    return attach(model, recipe.method, new_modules=modules, seed=recipe.seed)


def base_shape(recipe: Recipe) -> PreTrainedModel:
    """Return the base model's shapes, on the meta device; no weights are read."""
    model = build_meta(recipe.model.model_name_or_path, **_arguments(recipe))
    checks.check_family(recipe, model)
    if recipe.train.packing:
        check_packing(model)
    check_recompute(model, recompute_mode(recipe))
    return model


def fresh_modules(recipe: Recipe, model: PreTrainedModel) -> tuple[str, ...]:
    """Return the modules of a model that its checkpoint is expected to lack: a classifier's."""
    if not recipe.data.kind.classifier:
        return ()
    stored_modules = (model.base_model_prefix, *_own_head(recipe, model))
    return tuple(name for name, _ in model.named_children() if name not in stored_modules)


def make_settings(recipe: Recipe) -> Settings:
    """Return the loop's numbers; without a metric of its own, the task's main one decides."""
    train, scoring, output = recipe.train, recipe.eval, recipe.output
    method = recipe.method
    gate = method.gate if isinstance(method, MocMethod | MolexMethod) else None
    metric = scoring.metric_for_best_model or recipe.data.task.metrics[0]
    return Settings(
        seed=recipe.seed,
        num_train_epochs=train.num_train_epochs,
        max_steps=train.max_steps,
        per_device_train_batch_size=train.per_device_train_batch_size,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        routing_sync=isinstance(method, MocMethod) and method.routing.sync,
        activation_checkpointing=recompute_mode(recipe),
        torch_compile=train.torch_compile,
        group_by_length=train.group_by_length,
        optim=train.optim,
        learning_rate=train.learning_rate,
        gate_learning_rate=gate.learning_rate if gate else None,
        weight_decay=train.weight_decay,
        betas=(train.adam_beta1, train.adam_beta2),
        epsilon=train.adam_epsilon,
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        warmup_ratio=train.warmup_ratio,
        logging_steps=output.logging_steps,
        eval_strategy=scoring.eval_strategy,
        eval_steps=scoring.eval_steps,
        metric=metric if scoring.eval_strategy != "no" else None,
        patience=scoring.early_stopping_patience,
        save_strategy=output.save_strategy,
        save_steps=output.save_steps,
    )


def make_scoring_options(recipe: Recipe) -> ScoringOptions:
    """Return how the run is scored."""
    data, protocol = recipe.data, recipe.data.kind.protocol(recipe.eval.protocol)
    scoring, size = recipe.eval, recipe.eval.per_device_eval_batch_size
    return ScoringOptions(size, data.max_length, protocol, scoring.too_long, scoring.torch_compile)


def _arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the flat arguments that loading and meta building share."""
    model = recipe.model
    return {
        "dtype": "bfloat16" if recipe.train.bf16 else "float32",
        "attn_implementation": model.attn_implementation,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
        "quantization": asked_for(model),
        **make_kind(recipe.data.task).model_arguments(),
    }


def _own_head(recipe: Recipe, model: PreTrainedModel) -> tuple[str, ...]:
    """Return the modules of a classifier's head that its checkpoint holds."""
    if model.can_generate():
        return ()
    section = recipe.model
    return own_head(model, checkpoint_shapes(section.model_name_or_path, section.revision))


def _trained_modules(
    recipe: Recipe, model: PreTrainedModel, fresh: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the fresh modules, and those that the recipe names beside them.

    Raises RunError for a module that the model does not have or that cannot be trained alone.
    """
    inside = tuple(f"{name}." for name in fresh)
    recipe_modules = [
        name
        for name in recipe.train.modules or ()
        if name not in fresh and not name.startswith(inside)
    ]
    check_modules(model, tuple(recipe_modules))
    return (*fresh, *recipe_modules)
