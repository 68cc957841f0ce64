"""Which base a model in memory is, without its files: hashes of samples of every parameter."""

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

SAMPLES = 64  # values taken from each parameter, evenly spaced


def fingerprint(model: nn.Module, skip: Collection[str] = ()) -> dict[str, str]:
    """Hash names, shapes and 64 values of each parameter outside the modules in `skip`.

    The values are rounded to bfloat16 and, apart, to float16: a float32 checkpoint is known again
    when it is loaded in either. A model that was loaded in one of them has only that hash; one on
    the meta device has none. Bases that differ only between the samples are taken for the same.
    """
    outside = tuple(f"{name}." for name in skip)
    chosen = [(n, p) for n, p in model.named_parameters() if not n.startswith(outside or ("\0",))]
    dtypes = {parameter.dtype for _, parameter in chosen}
    if any(parameter.device.type == "meta" for _, parameter in chosen):
        return {}
    hashes = {}
    for name, other in (("bfloat16", torch.float16), ("float16", torch.bfloat16)):
        if other not in dtypes:
            digest = hashlib.sha256()
            for key, parameter in chosen:
                digest.update(f"{key} {tuple(parameter.shape)}\n".encode())
                digest.update(_bytes(_sample(parameter), getattr(torch, name)))
            hashes[name] = digest.hexdigest()
    return hashes


def same_base(one: Mapping[str, str | None], other: Mapping[str, str | None]) -> bool | None:
    """Whether two fingerprints are of one base; None where they have no hash in common."""
    common = [key for key in one if one[key] and other.get(key)]
    return all(one[key] == other[key] for key in common) if common else None


def _sample(parameter: Tensor) -> Tensor:
    values = parameter.detach().reshape(-1)
    count = min(len(values), SAMPLES)
    if count < 2:
        return values
    places = torch.arange(count, device=values.device) * (len(values) - 1) // (count - 1)
    return values[places]


def _bytes(values: Tensor, dtype: torch.dtype) -> bytes:
    return values.to("cpu", dtype).contiguous().view(torch.int16).numpy().tobytes()
