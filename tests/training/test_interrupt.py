"""Processes that train together answer a signal that came to one of them at the same point."""

import os
import signal

import pytest
from support.group import run_together

from moc_cli.processes import Processes
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
