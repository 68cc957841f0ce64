"""Programs of a test: by a fork of a clean process, in this one, or in a copy to be killed."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

# A process that only imports these, forked for each program: a fresh one without the seconds that
# the imports take. Nothing of this process is in it, and nothing of moc_cli or peft.
CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(
    ["torch", "transformers", "transformers.modeling_utils", "transformers.generation"]
    + ["transformers.models.llama.modeling_llama", "safetensors.torch", "accelerate"]
    + ["torch._dynamo", "torch.distributed.tensor"]
)


def run_program(program: str, *arguments: str, env: dict[str, str] | None = None) -> Any:
    """Run Python text in a clean process, as `python -c` does; what it printed is in the answer.

    `env` are changes of the environment; libraries that are imported already do not see them.
    """
    with TemporaryDirectory() as folder:
        streams = [str(Path(folder, name)) for name in ("out", "err")]
        given = (program, arguments, os.environ | (env or {}), os.getcwd(), streams)
        process = CLEAN.Process(target=_run_program, args=given)
        process.start()
        process.join()
        said = [Path(stream).read_text() for stream in streams]
    return subprocess.CompletedProcess(program, process.exitcode or 0, *said)


def _run_program(
    program: str, arguments: list[str], env: dict[str, str], folder: str, streams: list[str]
) -> None:
    assert "moc_cli" not in sys.modules, "the process is not clean"
    for number, stream in enumerate(streams, start=1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["-c", *arguments]
    exec(program, {"__name__": "__main__"})


@contextlib.contextmanager
def in_a_clean_process() -> Iterator[None]:
    """Run the Python programs that exports start by `run_program`."""
    start = subprocess.run

    def stand_in(command: list[str], **options: Any) -> Any:
        if list(command[:2]) != [sys.executable, "-c"]:
            return start(command, **options)
        return run_program(*command[2:], env=options.get("env"))

    with mock.patch.object(subprocess, "run", stand_in):
        yield


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Run the Python programs that exports start in this process, which saves all their imports.

    That a clean process can read an export is tested once for each format in tests/export.
    """
    start = subprocess.run

    def stand_in(command: list[str], **options: Any) -> Any:
        if list(command[:2]) != [sys.executable, "-c"]:
            return start(command, **options)
        package = sys.modules["moc_cli"]
        try:
            with mock.patch.object(sys, "argv", ["-c", *command[3:]]):
                exec(command[2], {"__name__": "__main__"})
        finally:
            sys.modules["moc_cli"] = package  # a standalone export's program blocks it
        return subprocess.CompletedProcess(command, 0, "", "")

    with mock.patch.object(subprocess, "run", stand_in):
        yield


def killed_at(touch: int, patch: Callable[[Callable[..., Any]], None], action: Callable) -> bool:
    """Run `action` in a copy of this process, which is killed at a touch of the disk.

    `patch(dying)` puts `dying(function)` in the place of the functions that touch the disk; the
    first `touch` calls go well. Return whether it was killed.
    """
    child = os.fork()
    if child == 0:
        left = touch

        def dying(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        try:
            patch(dying)
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
