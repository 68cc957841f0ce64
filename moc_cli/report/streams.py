"""Standard output and error that end no command: what they refuse is dropped and reported later.

A log may lie on a full disk, its reader may leave, a stream may be closed from the start; hours of
training must not be lost by that.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from moc_cli.errors import system_reason


class Stream:
    """A text stream in the place of another one; `refusal` is why it could not be written to.

    None where all went well, and where there is nobody to read it.
    """

    def __init__(self, inner: TextIO | None) -> None:
        # A closed stream is None: what is opened next would otherwise take its number.
        self._inner: Any = open(os.devnull, "w") if inner is None else inner  # noqa: SIM115
        self._broken = False
        self.refusal: str | None = None

    def write(self, text: str) -> int:
        """Write, or drop what cannot be written."""
        self._try(lambda: self._inner.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be written."""
        self._try(self._inner.flush)

    def isatty(self) -> bool:
        """Whether somebody watches."""
        return not self._inner.closed and bool(self._inner.isatty())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def _try(self, action: Callable[[], Any]) -> None:
        if self._broken:
            return
        try:
            action()
        except OSError as error:
            self._broken = True
            if error.errno != errno.EPIPE:
                self.refusal = system_reason(error)
            with suppress(OSError):  # Python's own last flush would fail once more
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._inner.fileno())
        except ValueError:  # closed since
            self._broken = True


@contextmanager
def lasting_streams(*, silent: bool = False) -> Iterator[Stream]:
    """Within it both standard streams drop what they cannot write, or all where they are `silent`;
    yields the one of results.
    """
    out, err = (Stream(None if silent else inner) for inner in (sys.stdout, sys.stderr))
    with redirect_stdout(cast(TextIO, out)), redirect_stderr(cast(TextIO, err)):
        try:
            yield out
        finally:
            out.flush()
            err.flush()
