"""Models and tokenizers from flat arguments: real weights, or shapes only on the meta device."""

import copy
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from moc_cli.errors import MocError
from moc_cli.models.fingerprint import describe_tensors, fingerprint, hash_tensors, in_a_layer
from moc_cli.models.known_tensors import recall
from moc_cli.models.quantization import (
    choose,
    keep_differentiable,
    linear_weights,
    make_config,
)
from moc_cli.models.stored_weights import find_stored
from moc_cli.models.weight_files import (
    check_weights,
    checkpoint_shapes,
    loaded_weight_files,
    resolve,
)
from moc_cli.recipe.quantization import Quantization
from moc_cli.recipe.tasks import HEADS, HeadName

CPU = torch.device("cpu")
_CAP = "attn_logit_softcapping"


@dataclass(frozen=True)
class Loaded:
    """A model with real weights, and the modules its checkpoint lacked.

    `tensors`, their hash and `fingerprint` are of the model without those modules, see
    `moc_cli.models.fingerprint`: as it would be unquantised, unless its files are quantised.
    """

    model: PreTrainedModel
    new_modules: tuple[str, ...]
    weights_hash: str
    source: str
    fingerprint: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    quantization: Quantization | None = None


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises MocError where it cannot be had."""
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with _in_one_sentence("tokenizer", name):
        return AutoTokenizer.from_pretrained(resolve(name), **options)


def load_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """A model's config.json; raises MocError where it cannot be had."""
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with _in_one_sentence("config", name):
        config: PreTrainedConfig = AutoConfig.from_pretrained(resolve(name), **options)
        return config


def find_shape(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedConfig, bool]:
    """A model's config for its shapes alone, and whether it is the one published in this package.

    A local or cached config.json comes first; then the package's own, which needs no hub and is of
    the hub's main branch; then the hub. Raises MocError where none can be had.
    """
    published = json.loads((files("moc_cli.models") / "shapes.json").read_text("utf-8"))
    if name in published and revision in (None, "main"):
        try:
            return AutoConfig.from_pretrained(name, local_files_only=True), False
        except (OSError, ValueError):
            values = dict(published[name])
            return AutoConfig.for_model(values.pop("model_type"), **values), True
    return load_config(name, revision=revision, trust_remote_code=trust_remote_code), False


def load_model(
    name: str,
    *,
    kind: HeadName,
    num_labels: int | None = None,
    problem_type: str | None = None,
    id2label: Mapping[str, str] | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 42,
    device: torch.device = CPU,
    quantization: Quantization | None = None,
    unquantized: Collection[str] = (),
    split: bool = False,
) -> Loaded:
    """Load a checkpoint (safetensors only) to a device; modules it lacks are initialised from
    `seed`.

    With `quantization` the linear weights of its layers are quantised, but for modules in
    `unquantized`, and so that they can be `split` over processes. Raises MocError where files are
    missing or damaged, and where weights and config disagree.
    """
    checkpoint_shapes(name, revision)  # refuses files that are cut off, before they load
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "device_map": {"": device},
        "revision": revision or "main",
        "trust_remote_code": trust_remote_code,
        "use_safetensors": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # they are refused below, each with its name
    }
    labels = _labels(num_labels, problem_type, id2label)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    options |= _attention(name, config, attn_implementation)
    quantization, on_loading = choose(name, config, quantization)
    if quantization is not None and on_loading:
        shapes = _on_meta(name, kind, config, labels, {"trust_remote_code": trust_remote_code})
        unquantized_modules = {key.removesuffix(".weight") for key in linear_weights(shapes)}
        unquantized_modules = {
            key for key in unquantized_modules if not in_a_layer(f"{key}.weight")
        } | {*unquantized}
        options["quantization_config"] = make_config(
            quantization, options["dtype"], unquantized_modules, split=split
        )
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), _in_one_sentence("weights", name), _quiet():
        torch.manual_seed(seed)
        auto = getattr(transformers, HEADS[kind].auto_class)
        model, info = auto.from_pretrained(resolve(name), **options, **labels)
    keep_differentiable(model)
    mismatched = {
        key: (stored, config_shape) for key, stored, config_shape in info["mismatched_keys"]
    }
    absent = info["missing_keys"] | mismatched.keys()
    check_weights(name, model, mismatched, info["missing_keys"], info["unexpected_keys"])
    fresh = fresh_modules(model, absent)
    stored = find_stored(model, name, revision)
    facts = {"dtype": model.dtype, "kind": kind, "fresh": fresh}
    facts |= {"packed": quantization if not stored else None}
    tensors = recall(
        loaded_weight_files(name, revision), facts, lambda: describe_tensors(model, fresh, stored)
    )
    hashes = fingerprint(model, fresh, stored)
    weights_hash = hash_tensors(tensors)
    return Loaded(model, fresh, weights_hash, resolve(name), hashes, tensors, quantization)


def build_meta(
    name: str,
    *,
    kind: HeadName,
    num_labels: int | None = None,
    problem_type: str | None = None,
    id2label: Mapping[str, str] | None = None,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The model's shapes on the meta device: no weights are read.

    Its `published_shape` says whether they are those that this package ships (see `find_shape`),
    its `quantization` how the model is quantised when it is loaded. Raises MocError for a damaged
    config, and where the shapes in the checkpoint's files are others.
    """
    config, published = find_shape(name, revision=revision, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {
        "dtype": getattr(torch, dtype),
        "trust_remote_code": trust_remote_code,
    }
    options |= _attention(name, config, attn_implementation)
    labels = _labels(num_labels, problem_type, id2label)
    chosen, on_loading = choose(name, config, quantization)
    model = _on_meta(name, kind, config, labels, options)
    stored = checkpoint_shapes(name, revision) or {}
    if chosen and not on_loading:  # their shapes are those of packed numbers
        stored = {key: shape for key, shape in stored.items() if key not in linear_weights(model)}
    shapes = {key: tuple(p.shape) for key, p in model.named_parameters() if key in stored}
    mismatched = {
        key: (stored[key], shape) for key, shape in shapes.items() if stored[key] != shape
    }
    check_weights(name, model, mismatched)
    setattr(model, "published_shape", published)  # noqa: B010 - torch's stubs know no flags
    setattr(model, "quantization", chosen)  # noqa: B010
    return model


def _attention(name: str, config: PreTrainedConfig, asked: str | None) -> dict[str, str]:
    """Return the option for the attention's code, as it is asked for or as the config needs it.

    sdpa cannot cap the attention's logits: transformers 5.17 takes it for gemma2 all the same, and
    leaves the cap out without a word.
    """
    capped = getattr(config.get_text_config(), _CAP, None) is not None
    if capped and asked == "sdpa":
        raise MocError(
            f"model '{name}' caps the logits of its attention ({_CAP}), which sdpa cannot; "
            "allowed for model.attn_implementation: eager, flash_attention_2",
            "leave model.attn_implementation out",
        )
    chosen = asked or ("eager" if capped else None)
    return {"attn_implementation": chosen} if chosen else {}


def _on_meta(
    name: str,
    kind: HeadName,
    config: PreTrainedConfig,
    labels: dict[str, Any],
    options: dict[str, Any],
) -> PreTrainedModel:
    config = copy.deepcopy(config)
    for key, value in labels.items():
        setattr(config, key, value)
    with _in_one_sentence("config", name), torch.device("meta"):
        auto = getattr(transformers, HEADS[kind].auto_class)
        model: PreTrainedModel = auto.from_config(config, **options)
        return model


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """A copy of a model's config with so many layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return config


def fresh_modules(model: nn.Module, absent: set[str]) -> tuple[str, ...]:
    """The largest modules that lie wholly in `absent` (parameter names), in the model's order."""
    fresh: list[str] = []
    for name, module in model.named_modules():
        inside = [f"{name}.{key}" for key, _ in module.named_parameters()]
        covered = any(name.startswith(f"{outer}.") for outer in fresh)
        if name and inside and not covered and absent.issuperset(inside):
            fresh.append(name)
    return tuple(fresh)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar and no report of missing keys: what is fresh is returned, and shown once."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def without_bars() -> Iterator[None]:
    """No progress bar of transformers, whose lines would stand among ours."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _labels(
    num_labels: int | None, problem_type: str | None, id2label: Mapping[str, str] | None
) -> dict[str, Any]:
    """A classifier's values of config.json: its classes are named by number if not otherwise."""
    class_values = {"num_labels": num_labels, "problem_type": problem_type}
    names = class_names(id2label) if id2label else {}
    return {key: value for key, value in class_values.items() if value is not None} | names


def name_classes(config: PreTrainedConfig, id2label: Mapping[str, str] | None) -> dict[str, Any]:
    """Name the classes in a model's config, unless it has other classes or names of its own; return
    the entries that were changed, as they were.
    """
    numbered = {number: f"LABEL_{number}" for number in range(len(id2label or ()))}
    if not id2label or getattr(config, "id2label", None) != numbered:
        return {}
    names = class_names(id2label)
    before = {key: getattr(config, key) for key in names}
    for key, value in names.items():
        setattr(config, key, value)
    return before


def class_names(id2label: Mapping[str, str]) -> dict[str, Any]:
    """The names of the classes as the two entries of a model's config."""
    names = {int(number): name for number, name in id2label.items()}
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


@contextmanager
def _in_one_sentence(part: str, name: str) -> Iterator[None]:
    """Turn whatever a library raises over a model's files into one sentence."""
    try:
        yield
    except MocError:
        raise
    except Exception as error:  # a damaged config fails in as many ways as it has values
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
        if not isinstance(error, OSError | ValueError):
            reason = f"{type(error).__name__}: {reason}"
        raise MocError(
            f"model '{name}': its {part} cannot be loaded: {reason}",
            hint="Give a hub id that is reachable or cached, a local folder in Hugging Face format "
            "(safetensors), or builtin:world-llama.",
        ) from error
