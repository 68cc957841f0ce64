"""Ctrl-C, SIGTERM and SIGHUP as a request that the loop answers between two steps.

Where several processes train together a signal may come to one of them alone: all answer it at the
same point, where they have agreed on it.
"""

import contextlib
import os
import signal
from types import FrameType

from moc_cli import processes
from moc_cli.signals import STOPS, EndedBySignal, handled, heeded

NOTICE = b"\nstopping after this step; Ctrl-C stops at once, without a checkpoint\n"


class Interrupt:
    """The first SIGINT, SIGTERM or SIGHUP is remembered; a second SIGINT raises KeyboardInterrupt.

    `signal` is the one to answer, the same in all processes. `received` is the one that this
    process has received; `agree`, or the training loop, shares it with the others. As a context
    manager it installs its handlers and puts the old ones back.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.received: int | None = None
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> "Interrupt":
        numbers = (signal.SIGINT, *heeded(STOPS))
        self._handlers.enter_context(handled(self._handle, numbers))
        return self

    def __exit__(self, kind: object, error: BaseException | None, place: object) -> None:
        if isinstance(error, processes.LostProcess):
            error.stopped_by = self.received
        self._handlers.close()

    def agree(self) -> int | None:
        """Return `signal`, which is now one that came to any of the processes; joint."""
        if self.signal is None:
            for number in processes.current().gather(self.received):
                self.signal = number if self.signal is None else self.signal
        return self.signal

    def check(self, message: str | None = None, hint: str | None = None) -> None:
        """Raise Interrupted if a signal came to any of the processes; joint.

        For work that has nothing of its own to save.
        """
        number = self.agree()
        if number is not None:
            raise Interrupted(number, message, hint)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.received = self.received is None, number
        group = processes.current()
        if group.world == 1:
            self.signal = number
        if first and group.main:
            # Not through sys.stderr: the signal may have come in the middle of a print.
            with contextlib.suppress(OSError):
                os.write(2, NOTICE)


class Interrupted(EndedBySignal):
    """The run was asked to stop."""

    def __init__(self, number: int, message: str | None = None, hint: str | None = None) -> None:
        super().__init__(message or f"stopped by {signal.Signals(number).name}", hint, number)
