"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is half-written is removed first."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from moc_cli.errors import MocError

STOPS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C asked the command to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class EndedBySignal(MocError):
    """A signal ended the work; `exit_code` is the shell's 128 + signal."""

    def __init__(self, message: str, hint: str | None, number: int) -> None:
        super().__init__(message, hint)
        self.number = number
        self.exit_code = 128 + number


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

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for stop_signal in STOPS:
            signal.signal(stop_signal, signal.SIG_IGN)
        state.number = number
        raise Stopped(number)

    with handled(stop, heeded(STOPS)):
        yield state


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], Any] | signal.Handlers, numbers: Iterable[int]
) -> Iterator[None]:
    """Within it a handler answers signals; outside of the main thread, which alone can, nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in previous.items():
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)


def heeded(numbers: Iterable[int]) -> list[int]:
    """Return the signals that have an effect: under nohup SIGHUP has none."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def stop_number(error: KeyboardInterrupt) -> int:
    """Return the signal behind a KeyboardInterrupt."""
    return error.number if isinstance(error, Stopped) else signal.SIGINT
