"""How several processes end: one exit code, and one sentence by the one that knows why."""

import os
import re
import signal
import socket
from typing import NoReturn

import pytest
from support.messages import refused

from moc_cli.cli import run
from moc_cli.launching import child
from moc_cli.launching.place import ProcessRank
from moc_cli.launching.plan import LaunchPlan
from moc_cli.launching.start import explain_ends
from moc_cli.processes import PARENT, LostProcess
from moc_cli.signals import EndedBySignal, Stopped

HOST = socket.gethostname()
KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT


def nothing() -> tuple[str, None]:
    return "", None


@pytest.mark.parametrize(
    ("ends", "forwarded", "code", "said"),
    [
        # a mistake, a bug: the process has told it, and the launcher has ended the others
        ({0: 2, 1: 143}, None, 2, ""),
        ({0: 143, 1: 2}, None, 2, ""),
        ({0: -15, 1: 1}, None, 1, ""),
        # a signal that came to one process: all have stopped together
        ({0: 143, 1: 143}, None, 143, ""),
        ({0: 130, 1: -15}, None, 130, ""),
        # a signal that came to the first `moc`: told by the processes, or not yet
        ({0: 130, 1: 130}, INT, 130, ""),
        ({0: -15, 1: -15}, TERM, 143, "stopped by signal 15"),
        ({0: -2, 1: -9}, INT, 130, "stopped by signal 2"),
    ],
)
def test_one_exit_code(
    ends: dict[int, int],
    forwarded: int | None,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert explain_ends(ends, LaunchPlan(2, ""), forwarded, nothing) == code
    error = capsys.readouterr().err
    assert (said in error) if said else not error


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        # the others find the connection closed
        ({0: 2, 1: -9}, 137),
        ({0: -11, 1: 143}, 139),
        ({0: -15, 1: -15}, 143),
    ],
)
def test_a_process_that_cannot_speak_is_told_of(ends: dict[int, int], code: int) -> None:
    with refused(EndedBySignal, host=f"(?<=on ){re.escape(HOST)}(?= was)") as caught:
        explain_ends(ends, LaunchPlan(2, ""), None, lambda: (" after step 3", "resume"))
    assert caught.value.exit_code == code


def test_a_machine_without_the_first_process_names_the_one_with_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert explain_ends({2: 2, 3: 143}, LaunchPlan(4, "", machines=2, rank=1), None, nothing) == 2
    assert "machine 0 says why" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rank", "local_rank", "out", "error"),
    [
        (0, 0, '"error"', ""),
        (1, 1, "", ""),  # the first one of its machine says the same
        (2, 0, "", f"Error: process 2 on {HOST}: moc recipes runs in one process"),
    ],
)
def test_one_process_speaks(
    rank: int,
    local_rank: int,
    out: str,
    error: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(child, "PATIENCE", 0.0)
    place = {"WORLD_SIZE": 4, "RANK": rank, "LOCAL_RANK": local_rank, "MASTER_ADDR": "10.0.0.1"}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    for name in ("MASTER_PORT", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("sys.__stderr__", open(2, "w", closefd=False))  # noqa: SIM115
    assert run(["recipes", "list", "--json"]) == 2
    said = capfd.readouterr()
    assert (out in said.out) if out else not said.out
    assert (error in said.err) if error else not said.err


class EndedBy(BaseException):
    """Stands for the end of this process by a signal."""


@pytest.mark.parametrize("noticed", ["before the signal", "after the signal"])
def test_who_is_ended_because_another_was_lost_says_nothing(
    noticed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher ends it; the `moc` that has started both tells why."""

    def end(process: int, number: int) -> NoReturn:
        assert (process, number) == (os.getpid(), TERM)
        raise EndedBy

    def wait(seconds: float) -> NoReturn:
        assert noticed == "before the signal"
        raise Stopped(TERM)

    def lost() -> NoReturn:
        error = LostProcess("lost")
        error.stopped_by = None if noticed == "before the signal" else TERM
        raise error

    monkeypatch.setenv(PARENT, str(os.getppid()))
    monkeypatch.setattr(child, "stop_with_parent", lambda: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr("os.kill", end)
    monkeypatch.setattr("time.sleep", wait)
    with pytest.raises(EndedBy):
        child.run_as_one(ProcessRank("moc", 2, 0, 0), lost, lambda _: None)
