"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is half-written is removed first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

STOPS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C asked the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


@dataclass
class Stop:
    """The signal that has come, if any."""

    number: int | None = None


@contextmanager
def stopped_by_signals() -> Iterator[Stop]:
    """Within it the first SIGTERM or SIGHUP raises Stopped; a second one does not cut off the
    cleaning up. A signal that the caller ignores, as under nohup, stays ignored.
    """
    state = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield state
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for each in STOPS:
            signal.signal(each, signal.SIG_IGN)
        state.number = number
        raise Stopped(number)

    before = {number: signal.getsignal(number) for number in STOPS}
    for number in STOPS:
        if not is_ignored(number):
            signal.signal(number, stop)
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def is_ignored(number: int) -> bool:
    """Whether a signal has no effect, as SIGHUP under nohup."""
    return signal.getsignal(number) is signal.SIG_IGN


def stop_number(error: KeyboardInterrupt) -> int:
    """Return the signal behind a KeyboardInterrupt."""
    return error.number if isinstance(error, Stopped) else signal.SIGINT
