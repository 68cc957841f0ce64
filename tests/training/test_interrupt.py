"""Processes that train together answer a signal that came to one of them at the same point."""

import os
import signal
from typing import NoReturn

import pytest
from support.group import run_together

from moc_cli.processes import LostProcess, Processes
from moc_cli.training.interrupt import Interrupt, Interrupted


def one_is_asked_to_stop(group: Processes) -> None:
    with Interrupt() as interrupt:
        interrupt.check()
        if not group.main:
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.signal is None  # nobody may act on it before the others know
        with pytest.raises(Interrupted, match="SIGTERM") as stop:
            interrupt.check()
        assert stop.value.exit_code == 128 + signal.SIGTERM
        assert interrupt.signal == interrupt.agree() == signal.SIGTERM


def test_a_signal_to_one_process_stops_all_at_the_same_point() -> None:
    run_together(one_is_asked_to_stop, 2)


def be_ended_and_notice_the_loss() -> NoReturn:
    with Interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
        raise LostProcess("lost")


def test_a_lost_process_tells_of_a_signal_that_came_before_it_was_noticed() -> None:
    """The launcher may see a loss first, and end this process while it still waits."""
    with pytest.raises(LostProcess) as alone, Interrupt():
        raise LostProcess("lost")
    assert alone.value.stopped_by is None
    with pytest.raises(LostProcess) as ended:
        be_ended_and_notice_the_loss()
    assert ended.value.stopped_by == signal.SIGTERM
