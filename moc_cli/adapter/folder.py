"""An adapter folder: two files, read as if a stranger had sent them.

adapter_config.json         method, placement, base; hashes of itself and of the payload
adapter_model.safetensors   the numbers

Sizes are bounded and checked against each other before anything of their size is allocated; links
that lead out of the folder are refused. No torch here.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from safetensors import SafetensorError, safe_open

from moc_cli.errors import RunError
from moc_cli.files import to_plain, write_bytes_atomic, write_json_atomic

CONFIG = "adapter_config.json"
PAYLOAD = "adapter_model.safetensors"
FORMAT = 2
READABLE = (1, 2)
LARGEST_CONFIG = 2**18  # bytes
LARGEST_HEADER = 2**22  # bytes; one entry takes about 120
DTYPES = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose config is intact and whose header agrees with the file's size.

    `shapes` is what the header declares; the numbers are not read before `payload()`.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    def payload(self) -> bytes:
        """Read the payload; raises RunError unless it matches its hash."""
        with _opened(self.folder, PAYLOAD) as file:
            content = file.read()
        if hashlib.sha256(content).hexdigest() != self.config.get("payload_sha256"):
            raise RunError(f"{self.folder / PAYLOAD} is damaged: it does not match its hash")
        return content


def read_adapter(folder: str | Path) -> Adapter:
    """Read the config and the payload's header; raises RunError where either cannot be trusted."""
    home = Path(folder)
    return Adapter(home, read_config(home), read_shapes(home))


def read_values(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json as plain values, whoever wrote it."""
    path = folder / CONFIG
    with _opened(folder, CONFIG) as file:
        content = file.read(LARGEST_CONFIG + 1)
    if len(content) > LARGEST_CONFIG:
        raise RunError(f"{path} is too large: at most {LARGEST_CONFIG} bytes are read")
    return _parse_object(content, path)


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json as plain values; its format and its own hash are checked."""
    path = folder / CONFIG
    config = read_values(folder)
    if config.get("format") not in READABLE or isinstance(config["format"], bool | float):
        raise RunError(
            f"{path} has format {str(config.get('format'))[:20]!r}; "
            f"this version reads {' and '.join(map(str, READABLE))}"
        )
    own_hash = config.get("config_sha256")
    if config["format"] == 1 and own_hash is not None:
        raise RunError(f"{path} is damaged: format 1 has no config_sha256")
    if config["format"] > 1 and own_hash != config_hash(config):
        raise RunError(f"{path} is damaged: it does not match its hash")
    return config


def stamp(config: Mapping[str, Any], payload: bytes) -> dict[str, Any]:
    """Return the config with its format, the payload's hash and its own."""
    digest = hashlib.sha256(payload).hexdigest()
    values: dict[str, Any] = to_plain({**config, "format": FORMAT, "payload_sha256": digest})
    return values | {"config_sha256": config_hash(values)}


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 over a config's values without its own hash; spaces and order do not matter."""
    values = {key: value for key, value in config.items() if key != "config_sha256"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_adapter(folder: Path, config: Mapping[str, Any], payload: bytes) -> None:
    """Write the two files into a folder; the config last: its hashes make the two complete."""
    write_bytes_atomic(folder / PAYLOAD, payload)
    write_json_atomic(folder / CONFIG, stamp(config, payload))


@contextmanager
def _opened(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a regular file of the folder; a link is followed only where it stays inside.

    Raises RunError where the file is missing, not a regular file, or a link that leads out.
    """
    path = folder / name
    try:
        home, real = folder.resolve(strict=True), path.resolve(strict=True)
        if real.parent not in (home, _blobs(home)):
            raise RunError(f"{path} is a link that leads out of its folder; it is not read")
        if not real.is_file():
            raise RunError(f"{path} is not a regular file; it is not read")
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(real, flags)
    except FileNotFoundError as error:
        raise RunError(f"{path} does not exist", "has the run finished?") from error
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "a link that leads to itself"
        raise RunError(f"{path} cannot be read: {reason}") from error
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _blobs(home: Path) -> Path | None:
    """Where the hub's cache keeps the files that a snapshot's links lead to."""
    cached = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    return home.parent.parent / "blobs" if cached else None


def _parse_object(content: bytes, path: Path) -> dict[str, Any]:
    """Read JSON strictly: an object, each key once, no NaN."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            raise ValueError("a key is given twice")
        return values

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number in JSON")

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError as error:
        raise RunError(f"{path} is damaged: nested too deeply") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: it cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: not a JSON object")
    return value


def read_shapes(folder: Path, name: str = PAYLOAD) -> dict[str, tuple[int, ...]]:
    """The shapes that the payload's header declares, none of whose numbers are read.

    safetensors refuses a header whose tensors do not fill the rest of the file exactly.
    """
    path = folder / name
    with _opened(folder, name) as payload:
        size = os.fstat(payload.fileno()).st_size
        length = int.from_bytes(payload.read(8), "little")
    if length > min(LARGEST_HEADER, size - 8):
        raise RunError(f"{path} is damaged: its header declares {length} bytes of {size}")
    shapes = {}
    try:
        with safe_open(path, framework="numpy") as tensors:
            for key in tensors.offset_keys():
                entry = tensors.get_slice(key)
                if entry.get_dtype() not in DTYPES:
                    raise RunError(
                        f"{path} is damaged: '{key[:80]}' has type {entry.get_dtype()}; "
                        f"allowed: {', '.join(DTYPES)}"
                    )
                shapes[key] = tuple(entry.get_shape())
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{path} is damaged: {reason}") from error
    return shapes
