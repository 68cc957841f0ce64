"""Processes as a launcher starts them, for tests: forked, each with the launcher's variables."""

import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import (
    SubprocessHandler,
)

from moc_cli.cli import run
from moc_cli.models.load import load_model
from moc_cli.processes import WORLD_SIZES

SECONDS = 120.0


# What a training imports: a copy of this process finds it there.
for name in (
    *("moc_cli.training.session", "torch._dynamo", "torch.distributed.tensor"),
    *("transformers.models.llama.modeling_llama", "accelerate.commands.launch"),
):
    import_module(name)


class Said(NamedTuple):
    """How a command has ended, and what it has printed."""

    code: int | None
    out: str
    err: str


class Command:
    """`moc ARGUMENTS` in a copy of this process, with other variables; its streams are files.

    The processes that it starts are copies of it too. With `new` the first of them is a new
    process, which imports all libraries again.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environ: Mapping[str, str] | None = None,
        *,
        new: bool = False,
    ) -> None:
        _make_tables()
        folder.mkdir(parents=True)
        self.folder = folder
        self.process: BaseProcess = get_context("fork").Process(
            target=_run, args=(list(arguments), folder, dict(environ or {}), new)
        )
        self.process.start()

    def wait(self) -> Said:
        """Wait for its end."""
        self.process.join(SECONDS)
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        return Said(self.process.exitcode, out, err)


@cache
def _make_tables() -> None:
    """Load a model: what transformers makes of its tables the first time, every copy then has."""
    load_model("builtin:world-llama", kind="causal")


class _Copy:
    """Stands in for the Popen of torch's launcher: a copy of this process, in a session of its own.

    `words` are those of `python -u -m moc_cli ARGUMENTS`.
    """

    def __init__(self, words: Sequence[str], environ: Mapping[str, str]) -> None:
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ.update(environ)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                usual = signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler
                signal.signal(number, usual)
            _exit_with(words[4:])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("moc", timeout)
            time.sleep(0.02)
        return code


def _run(arguments: list[str], folder: Path, environ: dict[str, str], new: bool) -> None:
    for name in WORLD_SIZES:
        os.environ.pop(name, None)
    os.environ.update({"OMP_NUM_THREADS": "1", **environ})
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    start = SubprocessHandler._popen

    def started(handler: SubprocessHandler, words: tuple, environ: dict[str, str]) -> Any:
        if new and handler.local_rank_id == 0:
            return start(handler, words, environ)
        return _Copy(words, environ)

    SubprocessHandler._popen = started
    gc.freeze()  # a collection would look through all that the parent has made
    _exit_with(arguments)


def _exit_with(arguments: Sequence[str]) -> None:
    """Run a command and end this process with its exit code; a bug has the code 1."""
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    code = 1
    try:
        code = run(list(arguments))
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
