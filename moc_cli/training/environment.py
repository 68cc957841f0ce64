"""What a run was made with: versions, machine, source, data and base model."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from moc_cli import __version__
from moc_cli.recipe.schema import Recipe
from moc_cli.training.build import Built

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "numpy")


def describe_environment(
    device: torch.device,
    recipe: Recipe,
    built: Built,
    *,
    vocabulary: str,
    data: dict[str, Any],
) -> dict[str, Any]:
    """Return what environment.json holds."""
    return {
        **describe_machine(device),
        "model": {
            "name": recipe.model.model_name_or_path,
            "revision": recipe.model.revision,
            "weights_sha256": built.weights_hash,
            "tensors": built.tensors,
        },
        "tokenizer": {"vocabulary_sha256": vocabulary},
        "data": data,
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what computes: versions, platform, device and commit."""
    own_versions = {"moc": __version__, "python": platform.python_version()}
    return {
        "versions": own_versions | {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "device": describe_device(device),
        "git": git_state(),
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """Return the device's kind and name, its memory in bytes, and the CPU's threads."""
    facts: dict[str, Any] = {"kind": device.type, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "memory": properties.total_memory}
        facts["cuda"] = torch.version.cuda
    else:
        facts["name"] = _processor()
    return facts


def git_state() -> dict[str, Any] | None:
    """Return commit and whether tracked files differ from it; None outside of a checkout."""
    source_file = Path(__file__).resolve()
    commit = _git(source_file.parent, "rev-parse", "HEAD")
    # An installed package may lie inside some other project's folder.
    if (
        commit is None
        or _git(source_file.parent, "ls-files", "--error-unmatch", source_file.name) is None
    ):
        return None
    changes = _git(source_file.parent, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """Return the CPU's name as the system gives it."""
    if sys.platform == "linux":
        try:
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
