"""Which base a model in memory is, whatever its files are called.

Two answers: the hash of all values of every parameter, made where the weights are loaded, and a
quick fingerprint of samples, which also knows a base again in another type of numbers.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from moc_cli.models.quantization import is_quantized, linear_weights, true_shape
from moc_cli.models.stored_weights import Weights

LISTED = 5  # parameters that an error names; the others are counted
SAMPLES = 64  # values taken from each parameter, evenly spaced


def fingerprint(
    model: nn.Module,
    skip: Collection[str] = (),
    stored: Weights = MappingProxyType({}),
) -> dict[str, str]:
    """Hash names, shapes and 64 values of each parameter outside the modules in `skip`.

    The values are rounded to bfloat16 and, apart, to float16: a float32 checkpoint is known again
    when it is loaded in either. A model that was loaded in one of them has only that hash; one on
    the meta device has none. Bases that differ only between the samples are taken for the same.

    Of quantised weights the unquantised values are taken from `stored`. The hashes whose names
    begin with `unquantized_` leave the weights of linear modules out: a base whose files are
    themselves quantised has no others.
    """
    chosen = list(_outside(model, skip))
    if any(parameter.device.type == "meta" for _, parameter in chosen):
        return {}
    linear = {_plain(name) for name in linear_weights(model)}
    hashes = {}
    if all(name in stored or not is_quantized(parameter) for name, parameter in chosen):
        hashes = _hash_samples(chosen, stored)
    unquantized_hashes = _hash_samples([pair for pair in chosen if pair[0] not in linear], stored)
    return hashes | {f"unquantized_{name}": value for name, value in unquantized_hashes.items()}


def _hash_samples(chosen: list[tuple[str, nn.Parameter]], stored: Weights) -> dict[str, str]:
    dtypes = {parameter.dtype for _, parameter in chosen}
    hashes = {}
    samples = [
        (key, true_shape(p), _sample(stored[key].values() if key in stored else p))
        for key, p in chosen
    ]
    for name, other_dtype in (("bfloat16", torch.float16), ("float16", torch.bfloat16)):
        if other_dtype not in dtypes:
            digest = hashlib.sha256()
            for key, shape, values in samples:
                digest.update(f"{key} {shape}\n".encode())
                digest.update(_bytes(values, getattr(torch, name)))
            hashes[name] = digest.hexdigest()
    return hashes


def same_base(first: Mapping[str, str | None], second: Mapping[str, str | None]) -> bool | None:
    """Whether two fingerprints are of one base; None where they have no hash in common."""
    common = [key for key in first if first[key] and second.get(key)]
    return all(first[key] == second[key] for key in common) if common else None


def describe_tensors(
    model: nn.Module, skip: Collection[str] = (), stored: Weights = MappingProxyType({})
) -> dict[str, str]:
    """Describe each parameter outside the modules in `skip`: "355x64 float32 <32 hex digits>".

    The digits are of the sha256 of all its values; those of a quantised weight as they are in
    `stored`, in the type in which the rest is loaded, and otherwise as they are packed.
    """
    descriptions = {}
    for name, parameter in _outside(model, skip):
        weight = stored.get(name)
        values = parameter if weight is None else weight.values().to(weight.dtype)
        descriptions[name] = _describe(values, true_shape(parameter))
    return descriptions


def is_packed(descriptions: Mapping[str, str]) -> bool:
    """Whether `describe_tensors` saw weights in 4 or 8 bits only."""
    return any(text.split()[1] in ("uint8", "int8") for text in descriptions.values())


def hash_tensors(tensors: Mapping[str, str]) -> str:
    """sha256 over what `describe_tensors` returned; the order does not matter."""
    lines = (f"{name} {tensors[name]}\n" for name in sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def find_differences(saved: Mapping[str, str], current: Mapping[str, str]) -> dict[str, str]:
    """Return how two descriptions differ: the parameter's name -> "355 rows then, 363 now"."""
    differences = {}
    for name in [*saved, *(name for name in current if name not in saved)]:
        if name not in current:
            differences[name] = "not there now"
        elif name not in saved:
            differences[name] = "not there then"
        elif saved[name] != current[name]:
            differences[name] = _difference(saved[name].split(), current[name].split())
    return differences


def list_differences(differences: Mapping[str, str]) -> str:
    """Return the first differences on lines of their own, and the number of the others."""
    lines = [f"  {name}: {difference}" for name, difference in differences.items()]
    and_more = [f"  and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join([*lines[:LISTED], *and_more])


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over a tokenizer's tokens and their ids."""
    tokens = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def in_a_layer(name: str) -> bool:
    """Whether a parameter belongs to a numbered layer, where controls sit and LoRA adapts."""
    return re.search(r"\.\d+\.", name) is not None


def _difference(saved: list[str], current: list[str]) -> str:
    shapes = [entry[0].split("x") for entry in (saved, current)]
    if shapes[0] != shapes[1]:
        if shapes[0][1:] == shapes[1][1:]:
            return f"{shapes[0][0]} rows then, {shapes[1][0]} now"
        return f"shape {saved[0]} then, {current[0]} now"
    return "other values" if saved[1] == current[1] else f"{saved[1]} then, {current[1]} now"


def _outside(model: nn.Module, skip: Collection[str]) -> Iterator[tuple[str, nn.Parameter]]:
    """The base's parameters; a module that peft keeps in copies counts as it came."""
    modules = tuple(f"{name}." for name in skip)
    for full_name, parameter in model.named_parameters():
        name = _plain(full_name)
        if ".modules_to_save." not in full_name and not name.startswith(modules):
            yield name, parameter


def _plain(name: str) -> str:
    return name.replace(".original_module.", ".")


def _describe(parameter: Tensor, shape: tuple[int, ...]) -> str:
    values = parameter.detach().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.sha256(values.numpy(force=True).data).hexdigest()[:32]
    dtype = str(parameter.dtype).removeprefix("torch.")
    return f"{'x'.join(map(str, shape))} {dtype} {digest}"


def _sample(parameter: Tensor) -> Tensor:
    values = parameter.detach().reshape(-1)
    count = min(len(values), SAMPLES)
    if count < 2:
        return values
    places = torch.arange(count, device=values.device) * (len(values) - 1) // (count - 1)
    return values[places]


def _bytes(values: Tensor, dtype: torch.dtype) -> bytes:
    return values.to("cpu", dtype).contiguous().view(torch.int16).numpy().tobytes()
