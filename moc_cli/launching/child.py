"""One of several processes: it ends with what has started it, and only the first one speaks."""

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from moc_cli import processes
from moc_cli.errors import MocError
from moc_cli.launching.place import ProcessRank
from moc_cli.processes import PARENT, Elsewhere, LostProcess
from moc_cli.report.characters import printable
from moc_cli.signals import stop_number

# A process that fails waits so many seconds for the launcher to end it, as it does when another
# one has failed first: that one's error is then the reason, and is reported already.
PATIENCE = 5.0
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def started_by_moc() -> bool:
    """Whether `moc` has started this process as one of several, and still runs."""
    return os.environ.get(PARENT) == str(os.getppid())


def stop_with_parent() -> None:
    """Let SIGTERM come when the `moc` that has started this process is killed."""
    if started_by_moc() and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if not started_by_moc():  # killed before
            os.kill(os.getpid(), signal.SIGTERM)


def run_as_one(
    place: ProcessRank, call: Callable[[], int], explain: Callable[[Exception], MocError | None]
) -> int:
    """Do the work of one of several processes, and return its exit code.

    What goes wrong in the first one is raised. Another one ends after it, and reports only what it
    alone has met. `explain` returns what the user reads of an error; None for a bug.
    """
    stop_with_parent()
    try:
        return _run(place, call, explain)
    except KeyboardInterrupt as stop:
        _end_by_signal(stop_number(stop))
        raise


def _run(
    place: ProcessRank, call: Callable[[], int], explain: Callable[[Exception], MocError | None]
) -> int:
    error = None
    try:
        code = call()
    except Exception as caught:
        if place.rank == 0:
            # Another one that was lost on this machine is reported by the `moc` that started both.
            if isinstance(caught, LostProcess) and started_by_moc():
                if caught.stopped_by is not None:
                    _end_by_signal(caught.stopped_by)
                time.sleep(PATIENCE)
            raise
        error, code = caught, 1 if explain(caught) is None else 2
    if code and place.rank > 0:
        time.sleep(PATIENCE)
        if error is not None:
            _tell(place, error, explain(error))
    return code


def _end_by_signal(number: int) -> None:
    """End this process as if the signal had not been caught: the `moc` that has started it says so.

    Does nothing where another program has started it.
    """
    if started_by_moc():
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _tell(place: ProcessRank, error: Exception, explained: MocError | None) -> None:
    """Print an error that this process alone has met, on the stream that is silent otherwise.

    What another one reports is left out, and so is what all processes of a machine meet alike
    before they join.
    """
    import traceback

    is_repeated = processes.current().world == 1 and place.local_rank > 0
    if isinstance(error, Elsewhere | LostProcess) or is_repeated or sys.__stderr__ is None:
        return
    if explained is None:
        text = "".join(traceback.format_exception(error))
    else:
        hint = explained.hint and f"Hint: {explained.hint}"
        text = "\n".join(filter(None, [explained.message, hint]))
    name = f"process {place.rank} on {processes.host_name()}"
    with suppress(OSError, ValueError):
        sys.__stderr__.write(printable(f"Error: {name}: {text}") + "\n")
        sys.__stderr__.flush()
