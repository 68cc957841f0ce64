"""What the tests of sweeps share."""

import sys
from contextlib import redirect_stdout
from typing import IO

import pytest
from support.sweeps import Ended

from moc_cli.cli import run
from moc_cli.sweep import execute


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that a sweep starts; each is run here, at once."""
    calls: list[list[str]] = []

    def start(command: list[str], environment: dict[str, str], log: IO[str]) -> Ended:
        assert command[:3] == [sys.executable, "-m", "moc_cli"]
        calls.append(command[3:])
        with redirect_stdout(log):
            return Ended(run(command[3:]))

    monkeypatch.setattr(execute, "start", start)
    monkeypatch.setattr(execute, "POLL", 0.0)
    return calls
