"""Programs that a test starts: in this process instead, or in a copy of it that is killed."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """Run the Python programs that exports start in this process: each saves 5 seconds of imports.

    That a fresh process can read an export is tested once for each format in tests/export.
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
