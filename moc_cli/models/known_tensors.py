"""Hashes of a large base's tensors, kept on the disk: to make them takes seconds for each 10 GB.

An entry is named by the path, size and time of each file of weights, and by all that decides what
is made of them. MOC_CACHE names the folder, `off` switches it off.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from moc_cli import __version__
from moc_cli.errors import FileError, RunError
from moc_cli.files import cache_folder, write_json_atomic
from moc_cli.run_files import Shape, read_object

SMALLEST = 2**30  # bytes of files; less is hashed in a second


class TensorDescriptions(Shape):
    """A description of each tensor, by name."""

    tensors: dict[str, str]


def recall(
    files: Sequence[Path], facts: Mapping[str, Any], describe: Callable[[], dict[str, str]]
) -> dict[str, str]:
    """Return what `describe` says of the tensors in `files`, or what it said of them before.

    `facts` are all that it depends on beside the files. An entry that is damaged or cannot be
    written is as if it were not there.
    """
    folder = cache_folder("weights")
    if folder is None or not files or sum(file.stat().st_size for file in files) < SMALLEST:
        return describe()
    path = folder / f"{_key(files, facts)}.json"
    with contextlib.suppress(RunError):
        descriptions: dict[str, str] = read_object(path, TensorDescriptions)["tensors"]
        return descriptions
    tensors = describe()
    with contextlib.suppress(FileError):
        write_json_atomic(path, {"tensors": tensors})
    return tensors


def _key(files: Sequence[Path], facts: Mapping[str, Any]) -> str:
    stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = [__version__, version("transformers"), stamps, sorted(facts.items())]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()
