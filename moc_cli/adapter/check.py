"""Whether an adapter folder fits a model in memory, checked before anything is allocated."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from transformers import PreTrainedModel

from moc_cli.adapter.config import AdapterConfig, drawn_from_the_base, parse_adapter
from moc_cli.adapter.folder import CONFIG, Adapter, read_adapter
from moc_cli.errors import MocError, RunError, compare_entries
from moc_cli.files import to_plain
from moc_cli.methods import attach
from moc_cli.models.fingerprint import (
    describe_tensors,
    find_differences,
    fingerprint,
    list_differences,
    same_base,
)
from moc_cli.models.quantization import is_quantized, of_model, plain_linears
from moc_cli.models.stored_weights import find_stored
from moc_cli.models.weight_files import known_hash
from moc_cli.recipe.methods import MethodConfig
from moc_cli.recipe.quantization import Quantization, of_arguments
from moc_cli.run_files import read_base_tensors

# The fields of peft in a config of lora or dora that decide what peft makes of it.
_PEFT = ("peft_type", "r", "lora_alpha", "use_dora", "target_modules")


@dataclass(frozen=True)
class CheckedAdapter:
    """An adapter that fits a model: what to place, with which seed, and the base's fingerprint.

    `note` says where the base is quantised in another way than in training.
    """

    adapter: Adapter
    config: AdapterConfig
    seed: int
    base: dict[str, str]
    note: str | None


def check_adapter(model: PreTrainedModel, folder: str | Path) -> CheckedAdapter:
    """Read a folder's config and header and compare them with the model, which stays as it is.

    Raises RunError with the reason where the controls cannot be those of this model.
    """
    check_free(model)
    adapter, config, peft = open_adapter(folder)
    names = tuple(config.modules)
    base = fingerprint(model, names, find_stored(model))
    missing = set(names) - dict(model.named_modules()).keys()
    if not missing:  # otherwise it may be another base's module
        check_modules(model, names)
    check_base(
        model.name_or_path or type(model).__name__,
        config.model_dump(),
        fingerprint=base,
        weights_hash=lambda: known_hash(model.name_or_path or ""),
        differences=lambda: _differences(model, adapter.folder, names),
    )
    if missing:
        check_modules(model, names)
    if config.seed is None and drawn_from_the_base(config.method):
        raise RunError(
            f"{adapter.folder} does not say from which seed its method was placed",
            "write it again: moc export RUN --to controls --output-dir DIR",
        )
    _check_fit(model, adapter, config, peft)
    seed = 42 if config.seed is None else config.seed
    note = compare_quantization(config.model_dump(), of_model(model))
    return CheckedAdapter(adapter, config, seed, base, note)


def open_adapter(folder: str | Path) -> tuple[Adapter, AdapterConfig, dict[str, Any]]:
    """Read a folder's config and header: the adapter, its checked config, peft's fields.

    Raises RunError where they cannot be trusted, or declare more than the payload holds.
    """
    adapter = read_adapter(folder)
    config, peft = parse_adapter(adapter.config, f"{adapter.folder}: {CONFIG}")
    check_bounds(adapter.folder, config.method, adapter.shapes)
    return adapter, config, peft


def read_state(adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of a payload; RunError where it is damaged, or holds NaN or infinity."""
    state = load(adapter.payload())
    check_finite(state, adapter.folder)
    return state


def check_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raise RunError naming the tensors of `state` that hold NaN or infinity."""
    wrong = [name[:80] for name, values in state.items() if not values.isfinite().all()]
    if wrong:
        ending = f" and {len(wrong) - 3} more hold" if len(wrong) > 3 else " holds"
        raise RunError(f"{source}: {', '.join(wrong[:3])}{ending} numbers that are not finite")


def check_free(model: PreTrainedModel) -> None:
    """Raise MocError where the model holds controls or adapters already."""
    if hasattr(model, "moc") or "peft_config" in vars(model):
        raise MocError("this model holds controls or adapters already", "detach them first")


def check_modules(model: PreTrainedModel, names: tuple[str, ...]) -> None:
    """Refuse modules that are not there, that hold the layers, or that share their weights."""
    modules = dict(model.named_modules())
    for name in names:
        module = modules.get(name)
        if not name or module is None:
            raise RunError(f"modules: {type(model).__name__} has no module '{name[:80]}'")
        if any(isinstance(part, nn.ModuleList) for part in module.modules()):
            raise RunError(f"modules: '{name}' holds the model's layers, which stay frozen")
        if any(map(is_quantized, module.parameters())):
            raise RunError(
                f"modules: '{name}' is quantised, and such weights cannot be trained",
                f"load the model with llm_int8_skip_modules=['{name}']",
            )
        parameter_ids = {id(parameter) for parameter in module.parameters()}
        shared = [
            key
            for key, parameter in model.named_parameters(remove_duplicate=False)
            if id(parameter) in parameter_ids and not key.startswith(f"{name}.")
        ]
        if shared:
            raise RunError(f"modules: '{name}' shares its weights with '{shared[0]}'")


def check_bounds(
    folder: str | Path, method: MethodConfig, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse widths that a payload of these shapes cannot hold, before anything is made of them."""
    numbers = sum(map(math.prod, shapes.values()))
    gate = getattr(method, "gate", None)
    widths = {"rank": method.rank, "gate.projection_dim": getattr(gate, "projection_dim", 0)}
    used = getattr(method, "top_k", 1) > 0 and getattr(gate, "kind", "") == "cosine"
    for key, width in widths.items():
        if width > numbers and (key == "rank" or used):
            raise RunError(
                f"{folder} says method.{key} = {str(width)[:20]}, but its payload holds only "
                f"{numbers} numbers"
            )


def check_base(
    name: str,
    expected: Mapping[str, Any],
    *,
    fingerprint: Mapping[str, str],
    weights_hash: Callable[[], str | None] = lambda: None,
    differences: Callable[[], str] = lambda: "",
    required: bool = True,
) -> None:
    """Raise RunError unless the base model `name` is the one that the controls were trained on.

    `expected` is what adapter_config.json says. The `fingerprint` of the parameters in memory
    decides where it can be compared. Otherwise the hash of the weight files does, by which older
    adapters name their base. Where neither can be compared, the base is refused if `required`.
    `differences` are the lines that a refusal ends with.
    """
    wanted_fingerprint = expected.get("base_fingerprint") or {}
    is_same = same_base(fingerprint, wanted_fingerprint)
    hashes = ""
    expected_hash = expected.get("base_weights_sha256")
    if is_same is None and expected_hash:
        own_hash = weights_hash()
        if own_hash == expected_hash:
            is_same = True
        elif own_hash is not None and not wanted_fingerprint:
            is_same = False
            hashes = f": sha256 {own_hash[:12]}, expected {expected_hash[:12]}"
    trained = "the controls do not name the base that they were trained on"
    if base_name := expected.get("base_model_name_or_path"):
        trained = f"the controls were trained on '{base_name}'"
    if is_same is None and required:
        raise RunError(
            f"the base '{name}' cannot be checked: {trained}, and neither its weight files nor a "
            "fingerprint in this type of numbers can be compared",
            "load the base in float32 or bfloat16, or from its folder",
        )
    if is_same is False:
        listed = differences()
        raise RunError(
            f"'{name}' has other weights than the base: {trained}{hashes}"
            + (f":\n{listed}" if listed else ""),
            "give the same base model, or train again on this one",
        )


def compare_quantization(expected: Mapping[str, Any], current: Quantization | None) -> str | None:
    """Return a sentence where the base is quantised in another way than the one trained on.

    `expected` is what adapter_config.json says.
    """
    trained = of_arguments(expected.get("base_quantization"))
    if trained == current:
        return None
    weights = [str(state) if state else "unquantised" for state in (trained, current)]
    return (
        f"the controls were trained on a base with {weights[0]} weights, and here they are "
        f"{weights[1]}: outputs differ a little"
    )


def _differences(model: PreTrainedModel, folder: Path, skip: tuple[str, ...]) -> str:
    """List the tensors in which the model is not the base of a run, whose `controls` are `folder`.

    Empty for an adapter outside of a run, which does not describe each tensor.
    """
    trained_tensors = read_base_tensors(folder.parent / "environment.json")
    if not trained_tensors:
        return ""
    return list_differences(find_differences(trained_tensors, describe_tensors(model, skip)))


def _check_fit(
    model: PreTrainedModel, adapter: Adapter, config: AdapterConfig, peft: dict[str, Any]
) -> None:
    """Place the method in the model's shapes alone and compare names, shapes and places."""
    shapes = attach(_shapes_of(model), config.method, new_modules=tuple(config.modules))
    expected = {name: tuple(p.shape) for name, p in shapes.named_trainables().items()}
    wrong = compare_entries(adapter.shapes, expected)
    if wrong:
        raise RunError(f"{adapter.folder} does not fit this model: {wrong}")
    placed = to_plain(shapes.adapter_config())
    if adapter.config.get("placement") != placed.get("placement"):
        raise RunError(f"{adapter.folder} names other places than its method has in this model")
    unknown = sorted(peft.keys() - placed.keys())
    differing = [key for key in _PEFT if key in peft and peft[key] != placed[key]]
    if unknown or differing:
        problem = (
            f"unknown key '{unknown[0][:80]}'" if unknown else f"{differing[0]} and method disagree"
        )
        raise RunError(f"{adapter.folder}: adapter_config.json: {problem}")


def _shapes_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model on the meta device: shapes without numbers, quantised or not."""
    memo: dict[int, Any] = {id(module): plain for module, plain in plain_linears(model)}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(model, memo)
