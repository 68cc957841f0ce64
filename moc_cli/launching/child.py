"""One of several processes: it ends with what has started it, and only the first one speaks."""

import ctypes
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress

from moc_cli import processes
from moc_cli.errors import MocError
from moc_cli.launching.place import Place
from moc_cli.processes import Elsewhere, LostProcess
from moc_cli.report.characters import printable

# The process that has started this one as one of several; it says how they have ended.
PARENT = "MOC_PARENT"
# A process that fails waits so many seconds for the launcher to end it, as it does when another
# one has failed first: that one's error is then the reason, and is told already.
PATIENCE = 3.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def started_by_moc() -> bool:
    """Whether `moc` has started this process as one of several, and still runs."""
    return os.environ.get(PARENT) == str(os.getppid())


def stop_with_parent() -> None:
    """Let SIGTERM come when the `moc` that has started this process is killed."""
    if started_by_moc() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if not started_by_moc():  # killed before
            os.kill(os.getpid(), signal.SIGTERM)


def end_by_signal(number: int) -> None:
    """End this process as if the signal had not been caught: the `moc` that has started it says so.

    Does nothing where another program has started it.
    """
    if started_by_moc():
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def ended_meanwhile() -> bool:
    """Wait for the launcher to end this process; return whether it does."""
    try:
        time.sleep(PATIENCE)
    except KeyboardInterrupt:
        return True
    return False


def tell(place: Place, error: Exception, known: MocError | None) -> None:
    """Print an error that this process alone has met, on the stream that is silent otherwise.

    `known` is what the user reads of it; None for a bug, which keeps its traceback.

    What another one tells is left out, and so is what all processes of a machine meet alike before
    they join.
    """
    alike = processes.current().world == 1 and place.local_rank > 0
    if isinstance(error, Elsewhere | LostProcess) or alike or sys.__stderr__ is None:
        return
    if known is None:
        text = "".join(traceback.format_exception(error))
    else:
        text = "\n".join(filter(None, [known.message, known.hint and f"Hint: {known.hint}"]))
    name = f"process {place.rank} on {socket.gethostname()}"
    with suppress(OSError, ValueError):
        sys.__stderr__.write(printable(f"Error: {name}: {text}") + "\n")
        sys.__stderr__.flush()
