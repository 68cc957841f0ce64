"""What torch.compile needs on a device, and the error where it cannot compile a module."""

import shutil

import torch
from torch.utils._triton import has_triton

from moc_cli.errors import MocError

COMPILERS = ("g++", "clang++")


def compiler_problem(device: torch.device) -> str | None:
    """Say what torch.compile lacks on a device."""
    if device.type == "cuda" and not has_triton():
        return "needs the package triton, which is not installed; leave it out"
    if device.type == "cpu" and not any(map(shutil.which, COMPILERS)):
        return f"needs a C++ compiler on the CPU ({' or '.join(COMPILERS)})"
    return None


def compile_error(key: str, part: str, error: Exception) -> MocError:
    """Return the error for `part` that could not be compiled, as a key of the recipe asks."""
    reason = next(line for line in [*str(error).splitlines(), "no reason given"] if line)
    return MocError(
        f"{key}: {part} could not be compiled: {reason}", f"leave it out: --set {key}=false"
    )
