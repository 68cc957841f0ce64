"""Writing files and folders so that a kill or a full disk leaves the old one or the new one.

Everything is written under `.tmp-<name>-<random>-<pid>` in the same folder, flushed to the disk and
renamed. A folder that replaces another passes through `.old-<name>-<random>-<pid>`, which
`clear_leftovers` puts back if the rename never came. A folder may come from a stranger: no file is
opened for writing through a link.
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moc_cli.errors import FileError, MocError, system_reason

TEMPORARY = ".tmp-"
REPLACED = ".old-"
LOCK = ".lock"
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # Lustre and NFS may answer so
# Older versions wrote no random part.
_LEFTOVER = re.compile(r"(\.tmp-|\.old-)(.+?)(?:-[0-9a-f]{16})?-([0-9]{1,10})")


def write_bytes_atomic(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`, all of it or nothing.

    Raises FileError when the disk refuses.
    """
    target = Path(path)
    temporary = unused_name(TEMPORARY, target)
    try:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
            _flush(target.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 with its line ends kept, all of it or nothing."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_json_atomic(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; dataclasses and paths are understood."""
    write_text_atomic(path, to_json(value) + "\n")


def cache_folder(part: str) -> Path | None:
    """Return where a part of the cache lies (`rows`, `weights`); None where it is switched off.

    The environment variable MOC_CACHE names the folder, or is `off`.
    """
    variable = os.environ.get("MOC_CACHE", "")
    if variable == "off":
        return None
    if variable:
        return Path(variable).expanduser() / part
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "moc" / part


@contextlib.contextmanager
def write_folder_atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary folder to fill; on a clean exit it becomes `path`, whatever was there.

    Raises FileError when the disk refuses; the old folder is then still in place.
    """
    target = Path(path)
    temporary, replaced = unused_name(TEMPORARY, target), unused_name(REPLACED, target)
    try:
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            clear_leftovers(target.parent, target.name)
            temporary.mkdir()
            yield temporary
            allowed = 0o666 & ~_umask()  # libraries write some files for the user alone
            for folder, _, names in os.walk(temporary):
                for name in names:
                    file = Path(folder, name)
                    file.chmod(file.stat().st_mode | allowed)
                    _flush(file)
                _flush(Path(folder))
            if os.path.lexists(target):
                os.rename(target, replaced)
            os.rename(temporary, target)
            _flush(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _put_back(replaced, target)


def open_own(path: str | Path, flags: int) -> int:
    """Open a file for reading and writing, or what else `flags` say; return its descriptor.

    Raises FileError where it is a link or no regular file: what it leads to is another's. A file
    with several names is one of those links too.
    """
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if os.path.islink(path):
        raise FileError(f"{path} is a link, and is not followed", "remove it")
    with disk_errors(path):
        descriptor = os.open(path, flags, 0o666)
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
        os.close(descriptor)
        raise FileError(f"{path} is a link or no regular file, and is not written to", "remove it")
    return descriptor


def lock(
    folder: str | Path, *, wait: bool = False, say: Callable[[str], None] | None = None
) -> int | None:
    """Lock an existing folder for this process; as `lock_file` for a file in it."""
    return lock_file(Path(folder, LOCK), os.O_RDWR | os.O_CREAT, wait=wait, say=say)


def lock_file(
    path: Path, flags: int, *, wait: bool = False, say: Callable[[str], None] | None = None
) -> int | None:
    """Open a file as `open_own` and lock it; return the descriptor that holds the lock.

    None where another process has it, unless `wait`. Closing the descriptor, and what a child got
    of it, gives it back, and so does their end. Where the file system has no locks there is none,
    and `say` gets a note. Raises FileError where the file cannot be opened.
    """
    import fcntl

    descriptor = open_own(path, flags)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        if say is not None:
            say(f"{path.parent}: its file system has no locks; start nothing else there meanwhile")
    return descriptor


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the lock of a folder, made if need be; waits while another process has it."""
    with disk_errors(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = lock(folder, wait=True)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


def check_folder(path: str | Path, *, within: str | Path | None = None) -> None:
    """Raise FileError unless `path` is a folder to write to, or can become one; nothing is made.

    Asked before long work, whose results would otherwise have no place. `within` is a folder that
    `path` lies in by its name: a link that leads out of it is refused.
    """
    folder = Path(path)
    if folder.parts[:1] and folder.parts[0].startswith("~"):
        raise FileError(f"cannot write to {path}: '{folder.parts[0]}' is not a folder's name here")
    with disk_errors(path):
        real = Path(os.path.realpath(folder))
        if within is not None and not real.is_relative_to(os.path.realpath(within)):
            raise FileError(
                f"cannot write to {path}: a link leads out of {within}", "--output-dir DIR"
            )
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(folder)  # says whether the name is too long, or out of reach
        parents = (folder, *folder.absolute().parents)
        place = next(parent for parent in parents if os.path.lexists(parent))
        if not place.is_dir():
            raise FileError(f"cannot write to {path}: {place} is not a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise FileError(f"cannot write to {path}: no permission to write in {place}")


def is_leftover(name: str) -> bool:
    """Whether a file of this name was being written when its process was killed."""
    return _LEFTOVER.fullmatch(name) is not None


def clear_leftovers(folder: str | Path, name: str | None = None) -> None:
    """Remove what killed processes left half-written in `folder` (of `name` only, if given).

    A folder caught between its two renames is put back under its own name. Files of processes that
    are still alive are left alone.
    """
    for path in sorted(Path(folder).iterdir()):
        parts = _LEFTOVER.fullmatch(path.name)
        if parts is None or (name and parts[2] != name):
            continue
        if int(parts[3]) != os.getpid() and _alive(int(parts[3])):
            continue
        if parts[1] == REPLACED:
            _put_back(path, path.with_name(parts[2]))
        else:
            with contextlib.suppress(OSError):  # it is in nobody's way
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
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


def flatten(values: dict[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return nested dicts as one, with keys joined by the separator."""
    flat: dict[str, Any] = {}
    for key, item in values.items():
        if isinstance(item, dict):
            inner = flatten(item, separator)
            flat |= {f"{key}{separator}{name}": value for name, value in inner.items()}
        else:
            flat[key] = item
    return flat


@contextlib.contextmanager
def disk_errors(target: str | Path) -> Iterator[None]:
    """Turn what the system refuses, to Python or to a library, into a FileError naming `target`."""
    try:
        yield
    except MocError:
        raise
    except Exception as error:
        reason = system_reason(error)
        if reason is None:
            raise
        raise FileError(f"cannot write {target}: {reason}") from error


def unused_name(prefix: str, target: Path) -> Path:
    """A name beside `target` that nobody can guess."""
    return target.with_name(f"{prefix}{target.name}-{os.urandom(8).hex()}-{os.getpid()}")


def _umask() -> int:
    """The permissions that this process does not give to new files."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_back(replaced: Path, target: Path) -> None:
    """Drop `replaced`, or give it its name back where nothing took its place."""
    if os.path.lexists(replaced) and not os.path.lexists(target):
        os.rename(replaced, target)
    with contextlib.suppress(OSError):  # it is in nobody's way
        remove(replaced)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
