"""Writing files and folders so that a kill or a full disk leaves the old one or the new one.

Everything is written under `.tmp-<name>-<pid>` in the same folder, flushed to the disk and renamed.
A folder that replaces another passes through `.old-<name>-<pid>`, which `clear_leftovers` puts back
if the rename never came.
"""

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moc_cli.errors import FileError

TEMPORARY = ".tmp-"
REPLACED = ".old-"


@contextlib.contextmanager
def file_atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write; on a clean exit it becomes `path`, otherwise it goes.

    Raises FileError when the disk refuses.
    """
    target = Path(path)
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    try:
        with _disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            os.replace(temporary, target)
            _flush(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, all of it or nothing."""
    with file_atomic(path) as temporary:
        temporary.write_bytes(content)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 with its line ends kept, all of it or nothing."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; dataclasses and paths are understood."""
    write_text_atomic(path, to_json(value) + "\n")


@contextlib.contextmanager
def write_folder_atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on a clean exit it becomes `path`, whatever was there.

    Raises FileError when the disk refuses; the old folder is then still in place.
    """
    target = Path(path)
    temporary = target.with_name(f"{TEMPORARY}{target.name}-{os.getpid()}")
    replaced = target.with_name(f"{REPLACED}{target.name}-{os.getpid()}")
    try:
        with _disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(target.parent, target.name)
            temporary.mkdir()
            yield temporary
            for folder, _, names in os.walk(temporary):
                for name in names:
                    _flush(Path(folder, name))
                _flush(Path(folder))
            if target.exists():
                os.rename(target, replaced)
            os.rename(temporary, target)
            _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(replaced, target)


def check_folder(path: str | Path) -> None:
    """Raise FileError unless `path` is a folder to write to, or can become one; nothing is made.

    Asked before long work, whose results would otherwise have no place.
    """
    folder = Path(path)
    place = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    if not place.is_dir():
        raise FileError(f"cannot write to {path}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise FileError(f"cannot write to {path}: no permission to write in {place}")


def clear_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove what killed processes left half-written in `folder` (of `name` only, if given).

    A folder caught between its two renames is put back under its own name. Files of processes that
    are still alive are left alone.
    """
    for path in sorted(Path(folder).iterdir()):
        prefix = path.name[: len(TEMPORARY)]
        owner, _, pid = path.name[len(prefix) :].rpartition("-")
        if prefix not in (TEMPORARY, REPLACED) or not pid.isdigit() or (name and owner != name):
            continue
        if int(pid) != os.getpid() and _alive(int(pid)):
            continue
        if prefix == REPLACED:
            _put_back(path, path.with_name(owner))
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """Return indented JSON; numbers that JSON cannot spell (NaN, infinity) become null."""
    return json.dumps(to_plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def to_plain(value: Any) -> Any:
    """Return `value` as dicts, lists, strings and finite numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise FileError(f"cannot write {target}: {reason}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_back(replaced: Path, target: Path) -> None:
    """Drop `replaced`, or give it its name back where nothing took its place."""
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)
    shutil.rmtree(replaced, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
