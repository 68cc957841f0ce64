"""The random states of torch, Python and NumPy as tensors: saved without pickle."""

import hashlib
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), Python and NumPy."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_torch(*parts: int) -> None:
    """Seed torch (all devices) with a pure function of `parts`."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8]) >> 1)


def capture() -> dict[str, Tensor]:
    """Return every global random state; `restore` takes it back bit for bit."""
    numpy_state: Any = np.random.get_state(legacy=True)
    _, keys, position, has_gauss, gauss = numpy_state
    _, words, python_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": _optional(python_gauss),
        "numpy.keys": torch.tensor(keys.astype(np.int64)),
        "numpy.position": torch.tensor([position, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([gauss], dtype=torch.float64),
    }
    if torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    return tensors


def restore(tensors: dict[str, Tensor]) -> None:
    """Set every global random state to what `capture` returned; absent devices are skipped."""
    torch.set_rng_state(tensors["torch"].clone())
    words = tuple(tensors["python.words"].tolist())
    gauss = tensors["python.gauss"].tolist()
    random.setstate((3, words, gauss[1] if gauss[0] else None))
    position, has_gauss = tensors["numpy.position"].tolist()
    keys = tensors["numpy.keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, position, has_gauss, tensors["numpy.gauss"].item()))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"cuda.{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda.{index}"].clone(), index)


def _optional(value: float | None) -> Tensor:
    """Return [is there, value] as float64."""
    is_set = value is not None
    return torch.tensor([float(is_set), value if is_set else 0.0], dtype=torch.float64)
