"""The unquantised values of a base whose linear weights are quantised on loading.

They are read from its files, one weight at a time, so that a base is known by the same hashes
whether it is quantised or not.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from moc_cli.models.quantization import is_quantized, true_shape
from moc_cli.models.weight_files import loaded_weight_files

Weights = Mapping[str, "StoredWeight"]  # by the name of the parameter


@dataclass(frozen=True)
class StoredWeight:
    """One weight in a safetensors file; `values` are read at each call."""

    path: Path
    key: str
    dtype: torch.dtype  # in which it would be loaded

    def values(self) -> Tensor:
        """Return the weight in the type of the file."""
        with safe_open(self.path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(self.key)
            return tensor


def find_stored(
    model: PreTrainedModel, name: str | None = None, revision: str | None = None
) -> Weights:
    """Return where the unquantised values of a model's quantised weights are, by parameter.

    `name` is the model's folder or hub id, by default as transformers noted it. Empty where they
    are not all here: nothing is fetched, and files that are themselves quantised have none.
    """
    shapes = {key: true_shape(p) for key, p in model.named_parameters() if is_quantized(p)}
    source = name or model.name_or_path
    if not shapes or not source:
        return {}
    prefix = f"{model.base_model_prefix}."
    stored_weights: dict[str, StoredWeight] = {}
    try:
        for path in loaded_weight_files(source, revision):
            with safe_open(path, framework="pt") as file:
                names: list[str] = file.keys()
                for stored in names:
                    key = next((k for k in (stored, prefix + stored) if k in shapes), None)
                    if key is None:
                        continue
                    part = file.get_slice(stored)
                    if tuple(part.get_shape()) == shapes[key] and part.get_dtype() in _FLOATS:
                        stored_weights[key] = StoredWeight(path, stored, model.dtype)
    except (OSError, ValueError, SafetensorError):
        return {}
    return stored_weights if stored_weights.keys() == shapes.keys() else {}


_FLOATS = ("F64", "F32", "F16", "BF16")
