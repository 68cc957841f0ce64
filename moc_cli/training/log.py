"""metrics.jsonl: one line per logged step or evaluation, and the trackers a recipe asks for.

What the machine did (seconds, speed, memory) stands under `measured`; everything else in a line is
the same in every repetition of the run, resumed or not.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from moc_cli.errors import MocError
from moc_cli.files import disk_errors, flatten, open_own, to_plain, write_bytes_atomic
from moc_cli.recipe.schema import Recipe
from moc_cli.run_files import read_bytes

MEASURED = "measured"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
Track = Callable[[dict[str, float], int], None]


class MetricsLog:
    """Appends JSON lines to `path` and passes their numbers on to `track`."""

    def __init__(self, path: Path, track: Track | None = None) -> None:
        self.path = path
        self.track = track
        self.lines = 0

    def keep(self, lines: int) -> None:
        """Drop all after the first `lines` lines: what a killed run wrote beyond its checkpoint."""
        content = read_bytes(self.path) if self.path.exists() else b""
        first = content.split(b"\n")[:-1][:lines]
        self.lines = len(first)
        write_bytes_atomic(self.path, b"".join(line + b"\n" for line in first))

    def write(self, record: dict[str, Any]) -> None:
        """Append one line.

        Raises FileError when the disk refuses.
        """
        line = json.dumps(to_plain(record), allow_nan=False) + "\n"
        descriptor = open_own(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        with disk_errors(self.path), os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(line)
        self.lines += 1
        if self.track is not None:
            numbers = {
                name: float(value)
                for name, value in flatten(record, "/").items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            self.track(numbers, record["step"])

    def flush(self) -> None:
        """Put the lines on the disk, before a checkpoint that counts on them."""
        if self.path.exists():
            descriptor = open_own(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def require_trackers(names: Sequence[str]) -> None:
    """Raise MocError when a tracker's package is missing; nothing is imported."""
    for name in names:
        packages = PACKAGES.get(name, (name,))
        if not any(importlib.util.find_spec(package) for package in packages):
            raise MocError(
                f"output.report_to asks for {name}, but the package {packages[0]} is not installed",
                f"pip install {packages[0]}, or --set output.report_to=[]",
            )


def start_trackers(accelerator: Accelerator, recipe: Recipe) -> Track | None:
    """Start the trackers the recipe asks for; return what feeds them."""
    if not recipe.output.report_to:
        return None
    keys = flatten(recipe.model_dump(mode="json", exclude_none=True))
    config = {
        key: value if isinstance(value, str | int | float) else str(value)
        for key, value in keys.items()
    }
    accelerator.init_trackers("moc", config=config)
    return lambda values, step: accelerator.log(values, step=step)
