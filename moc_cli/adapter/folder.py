"""An adapter folder: two files, read as if a stranger had sent them.

adapter_config.json         method, placement, base; hashes of itself and of the payload
adapter_model.safetensors   the numbers

Sizes are bounded and checked against each other before anything of their size is allocated; links
that lead out are refused; what is damaged is told in one sentence. No torch here.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moc_cli.errors import RunError
from moc_cli.files import to_plain, write_bytes_atomic, write_json_atomic

CONFIG = "adapter_config.json"
PAYLOAD = "adapter_model.safetensors"
FORMAT = 2
READABLE = (1, 2)
LARGEST_CONFIG = 2**18  # bytes
LARGEST_HEADER = 2**22  # bytes; one entry takes about 120
WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes a number


@dataclass(frozen=True)
class Entry:
    """One tensor as the payload's header declares it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose config is whole and whose header agrees with the file's size.

    The payload itself is not read before `payload()`.
    """

    folder: Path
    config: dict[str, Any]
    entries: dict[str, Entry]
    size: int

    @property
    def numbers(self) -> int:
        """How many numbers the payload declares."""
        return sum(math.prod(entry.shape) for entry in self.entries.values())

    def payload(self) -> bytes:
        """Read the payload; raises RunError unless it matches its hash."""
        path = self.folder / PAYLOAD
        with _Opened(self.folder, PAYLOAD) as opened:
            content = opened.read(self.size)
        if hashlib.sha256(content).hexdigest() != self.config.get("payload_sha256"):
            raise RunError(f"{path} is damaged: it does not match its hash")
        return content


def read_adapter(folder: str | Path) -> Adapter:
    """Read the config and the payload's header; raises RunError where either cannot be trusted."""
    place = Path(folder)
    config = read_config(place)
    with _Opened(place, PAYLOAD) as opened:
        entries = _entries(opened)
        return Adapter(place, config, entries, opened.size)


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json as plain values; its format and its own hash are checked."""
    path = folder / CONFIG
    with _Opened(folder, CONFIG) as opened:
        if opened.size > LARGEST_CONFIG:
            raise RunError(f"{path} has {opened.size} bytes; at most {LARGEST_CONFIG} are read")
        content = opened.read(opened.size)
    config = _object(content, path)
    if config.get("format") not in READABLE or isinstance(config["format"], bool | float):
        raise RunError(
            f"{path} has format {str(config.get('format'))[:20]!r}; "
            f"this version reads {' and '.join(map(str, READABLE))}"
        )
    stamped = config.get("config_sha256")
    if config["format"] == 1 and stamped is not None:
        raise RunError(f"{path} is damaged: format 1 has no config_sha256")
    if config["format"] > 1 and stamped != config_hash(config):
        raise RunError(f"{path} is damaged: it does not match its hash")
    return config


def stamp(config: Mapping[str, Any], payload: bytes) -> dict[str, Any]:
    """Return the config with its format, the payload's hash and its own."""
    digest = hashlib.sha256(payload).hexdigest()
    marked: dict[str, Any] = to_plain({**config, "format": FORMAT, "payload_sha256": digest})
    return marked | {"config_sha256": config_hash(marked)}


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 over a config's values without its own hash, whatever the file's spaces and order."""
    values = {key: value for key, value in config.items() if key != "config_sha256"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_adapter(folder: Path, config: Mapping[str, Any], payload: bytes) -> None:
    """Write the two files into a folder; the config last, for its hash is what makes them whole."""
    write_bytes_atomic(folder / PAYLOAD, payload)
    write_json_atomic(folder / CONFIG, stamp(config, payload))


def check_entries(
    entries: Mapping[str, Entry], expected: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Raise RunError unless the payload declares exactly the expected names and shapes."""
    wrong = [f"missing '{name}'" for name in expected.keys() - entries.keys()]
    wrong += [f"unexpected '{name[:80]}'" for name in entries.keys() - expected.keys()]
    wrong += [
        f"'{name}' has shape {list(entries[name].shape)}, expected {list(expected[name])}"
        for name in expected.keys() & entries.keys()
        if entries[name].shape != tuple(expected[name])
    ]
    if wrong:
        shown = "; ".join(sorted(wrong)[:5])
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise RunError(f"{where} does not fit this model: {shown}{more}")


class _Opened:
    """A regular file of the folder, opened without following a link that leads out of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        try:
            home, real = folder.resolve(strict=True), self.path.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            self._refuse(error)
        if real.parent != home and real.parent != _blobs(home):
            raise RunError(f"{self.path} is a link that leads out of its folder; it is not read")
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            self._descriptor = os.open(real, flags)
        except OSError as error:
            self._refuse(error)
        state = os.fstat(self._descriptor)
        if not stat.S_ISREG(state.st_mode):
            os.close(self._descriptor)
            raise RunError(f"{self.path} is not a regular file; it is not read")
        self.size = state.st_size

    def read(self, count: int) -> bytes:
        """Return the next `count` bytes; raises RunError where the file ends before."""
        parts, left = [], count
        while left:
            part = os.read(self._descriptor, left)
            if not part:
                raise RunError(f"{self.path} is damaged: it ends {left} bytes too early")
            parts.append(part)
            left -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __enter__(self) -> "_Opened":
        return self

    def __exit__(self, *problem: object) -> None:
        os.close(self._descriptor)

    def _refuse(self, error: OSError | RuntimeError) -> NoReturn:
        if isinstance(error, FileNotFoundError):
            raise RunError(f"{self.path} does not exist", "has the run finished?") from error
        reason = getattr(error, "strerror", None) or "a link that leads to itself"
        raise RunError(f"{self.path} cannot be read: {reason}") from error


def _blobs(home: Path) -> Path | None:
    """Where the hub's cache keeps the files that a snapshot's links lead to."""
    cached = home.parent.name == "snapshots" and home.parent.parent.name.startswith("models--")
    return home.parent.parent / "blobs" if cached else None


def _object(content: bytes, path: Path) -> dict[str, Any]:
    """Read JSON strictly: an object, each key once, no NaN."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key is given twice")
        return found

    def number(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a number that JSON knows")

    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=number)
    except RecursionError as error:
        raise RunError(f"{path} is damaged: nested too deeply") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: it cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} is damaged: not a JSON object")
    return value


def _entries(opened: _Opened) -> dict[str, Entry]:
    """Read a safetensors header whose declared parts fill the rest of the file exactly."""
    damaged = f"{opened.path} is damaged:"
    if opened.size < 8:
        raise RunError(f"{damaged} {opened.size} bytes are no safetensors file")
    length = int.from_bytes(opened.read(8), "little")
    if length > min(LARGEST_HEADER, opened.size - 8):
        raise RunError(f"{damaged} its header declares {length} bytes of {opened.size}")
    header = _object(opened.read(length), opened.path)
    meta = header.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(text, str) for text in meta.values()):
        raise RunError(f"{damaged} its metadata are not texts")
    parts = []
    entries = {}
    for name, value in header.items():
        begin, end, entry = _entry(value, f"{damaged} '{name[:80]}'")
        parts.append((begin, end))
        entries[name] = entry
    place = 0
    for begin, end in sorted(parts):
        if begin != place:
            raise RunError(f"{damaged} its parts leave gaps or overlap")
        place = end
    if place != opened.size - 8 - length:
        raise RunError(
            f"{damaged} its header declares {place} bytes of numbers, "
            f"the file holds {opened.size - 8 - length}"
        )
    return entries


def _entry(value: Any, where: str) -> tuple[int, int, Entry]:
    """Check one entry of the header: a type that controls have, a shape, a size that fits them."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise RunError(f"{where} is no entry of a safetensors header")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise RunError(f"{where} has type {str(dtype)[:20]!r}; allowed: {', '.join(WIDTHS)}")
    if not _sizes(shape) or len(shape) > 8:
        raise RunError(f"{where} has no readable shape")
    if not _sizes(offsets) or len(offsets) != 2:
        raise RunError(f"{where} has no readable place in the file")
    begin, end = offsets
    if end - begin != math.prod(shape) * WIDTHS[dtype]:
        raise RunError(
            f"{where} of shape {str(shape)[:60]} in {dtype} declares {end - begin} bytes"
        )
    return begin, end, Entry(dtype, tuple(shape))


def _sizes(values: Any) -> bool:
    """Whether these are whole numbers from 0 that a file can have."""
    return isinstance(values, list) and all(
        type(size) is int and 0 <= size < 2**63 for size in values
    )
