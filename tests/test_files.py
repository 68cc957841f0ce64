"""Writing files and folders: all of the new one, or all of the old one."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import SafetensorError
from support.messages import refused

from moc_cli import files
from moc_cli.errors import FileError

DEAD = 2**22 + 1  # above the largest process id of Linux


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_place_without_room_for_a_folder_is_told(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to("nowhere")
    for path in ("file", "file/a/b", "lost", "lost/a"):
        with refused(FileError):
            files.check_folder(tmp_path / path)
    monkeypatch.chdir(tmp_path)
    with refused(FileError):
        files.check_folder("file/a")
    for path in (".", "new/a/b", tmp_path):
        files.check_folder(path)
    assert names(tmp_path) == ["file", "lost"]
    monkeypatch.setattr(os, "access", lambda *_: False)
    with refused(FileError):
        files.check_folder("new")


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(FileError):
        files.write_text_atomic(tmp_path / "file" / "a", "text")


def test_text_is_written_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    files.write_text_atomic(path, "ä\r\nb\n")
    assert path.read_bytes() == b"\xc3\xa4\r\nb\n"
    files.write_text_atomic(path, "c")
    assert path.read_text() == "c"
    assert names(path.parent) == ["a.txt"]


def test_a_full_disk_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, folder = tmp_path / "a.txt", tmp_path / "b"
    files.write_text_atomic(path, "old")
    with files.write_folder_atomic(folder) as temporary:
        (temporary / "x").write_text("old")
    monkeypatch.setattr(os, "fsync", refuse)
    with refused(FileError):
        files.write_text_atomic(path, "new")
    with refused(FileError), files.write_folder_atomic(folder) as new:
        (new / "x").write_text("new")
    assert path.read_text() == (folder / "x").read_text() == "old"
    assert names(tmp_path) == ["a.txt", "b"]


def test_what_a_library_says_of_a_full_disk_is_a_users_error(tmp_path: Path) -> None:
    """safetensors and tokenizers have errors of their own, no OSError."""
    said = "Error while serializing: I/O error: No space left on device (os error 28)"
    with refused(FileError), files.write_folder_atomic(tmp_path / "x"):
        raise SafetensorError(said)
    with pytest.raises(ZeroDivisionError), files.write_folder_atomic(tmp_path / "x"):
        raise ZeroDivisionError
    assert names(tmp_path) == []


def test_no_file_is_written_through_a_link(tmp_path: Path, monkeypatch) -> None:
    """Not even where somebody has guessed the process and the random part of the name."""
    victim, target = tmp_path / "victim", tmp_path / "results.json"
    victim.write_text("mine")
    target.symlink_to("victim")
    files.write_text_atomic(target, "new")
    assert (victim.read_text(), target.read_text(), target.is_symlink()) == ("mine", "new", False)
    monkeypatch.setattr(os, "urandom", lambda count: bytes(count))
    (tmp_path / f".tmp-results.json-{'0' * 16}-{os.getpid()}").symlink_to("victim")
    with refused(FileError):
        files.write_text_atomic(target, "newer")
    assert (victim.read_text(), target.read_text()) == ("mine", "new")


def test_a_lock_is_a_file_of_its_own(tmp_path: Path) -> None:
    victim, lock = tmp_path / "victim", tmp_path / ".lock"
    victim.write_text("mine")
    for make in (lambda: lock.symlink_to("victim"), lambda: os.link(victim, lock)):
        make()
        with refused(FileError):
            files.lock(tmp_path)
        lock.unlink()
    os.mkfifo(lock)
    with refused(FileError):
        files.lock(tmp_path)
    lock.unlink()
    descriptor = files.lock(tmp_path)
    assert descriptor is not None
    assert files.lock(tmp_path) is None
    os.close(descriptor)
    with files.locked(tmp_path):
        assert files.lock(tmp_path) is None
    assert victim.read_text() == "mine"


def test_folders_that_cannot_be_written_are_told(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    with refused(FileError):
        files.check_folder("~/x")
    with refused(FileError, name="n{300}"):
        files.check_folder("n" * 300)
    with refused(FileError):
        files.check_folder("run/eval/rank", within="run")
    with refused(FileError, reason="(?<=loop/x: ).*(not a folder|symbolic links)"):
        files.check_folder("loop/x")
    files.check_folder(tmp_path / "run" / "routing", within="run")


def test_json_keeps_dataclasses_and_says_null_for_nan(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Point:
        x: float
        where: Path

    files.write_json_atomic(tmp_path / "a.json", {"p": [Point(float("nan"), Path("b"))], 1: "ä"})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"p": [{"x": None, "where": "b"}], "1": "ä"}
    assert text.endswith("}\n")


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    with files.write_folder_atomic(folder) as temporary:
        (temporary / "old").write_text("1")
    with files.write_folder_atomic(folder) as temporary:
        assert names(folder) == ["old"]
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new").write_text("2")
    assert names(folder) == ["sub"]
    assert (folder / "sub" / "new").read_text() == "2"
    assert names(tmp_path) == ["step-1"]


def test_leftovers_of_dead_processes_go(tmp_path: Path) -> None:
    (tmp_path / f".tmp-step-1-{DEAD}").mkdir()
    (tmp_path / f".tmp-step-1-{'0' * 16}-{DEAD}").mkdir()
    (tmp_path / f".tmp-step-1-{'f' * 16}-{DEAD}").symlink_to("nowhere")
    (tmp_path / f".tmp-a.txt-{DEAD}").write_text("half")
    (tmp_path / f".tmp-step-1-{os.getppid()}").mkdir()
    (tmp_path / ".tmp-notes").write_text("a user's own")
    with files.write_folder_atomic(tmp_path / "step-1"):
        pass
    alive = f".tmp-step-1-{os.getppid()}"
    assert names(tmp_path) == sorted([f".tmp-a.txt-{DEAD}", alive, ".tmp-notes", "step-1"])
    files.clear_leftovers(tmp_path)
    assert names(tmp_path) == sorted([alive, ".tmp-notes", "step-1"])


def test_a_folder_caught_between_its_renames_is_put_back(tmp_path: Path) -> None:
    (tmp_path / f".old-step-1-{DEAD}").mkdir()
    (tmp_path / f".old-step-2-{DEAD}").mkdir()
    (tmp_path / "step-2").mkdir()
    files.clear_leftovers(tmp_path)
    assert names(tmp_path) == ["step-1", "step-2"]


KILLED = """
import os, signal, sys
from moc_cli import files
count = int(sys.argv[2])
real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}
def dying(name):
    def call(*args):
        global count
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real[name](*args)
    return call
for name in real:
    setattr(os, name, dying(name))
with files.write_folder_atomic(sys.argv[1]) as folder:
    (folder / "a").write_text("new")
    (folder / "b").write_text("new")
print("survived")
"""


def test_a_kill_at_any_call_leaves_the_old_folder_or_the_new(tmp_path: Path) -> None:
    """Killed before each of the calls that touch the disk in turn, then cleaned up after."""
    seen = set()
    for count in range(1, 20):
        folder = tmp_path / str(count) / "step"
        with files.write_folder_atomic(folder) as temporary:
            (temporary / "a").write_text("old")
            (temporary / "b").write_text("old")
        done = subprocess.run([sys.executable, "-c", KILLED, folder, str(count)], check=False)
        files.clear_leftovers(folder.parent)
        assert names(folder.parent) == ["step"]
        content = {name: (folder / name).read_text() for name in ("a", "b")}
        assert len(set(content.values())) == 1
        seen.add(content["a"])
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert done.returncode == 0
    assert count > 5
    assert seen == {"old", "new"}
