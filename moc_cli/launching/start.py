"""Starting the processes of one command through accelerate's launcher, and how they have ended."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import psutil

from moc_cli import processes
from moc_cli.errors import MocError
from moc_cli.launching.place import THREADS, threads_of_each
from moc_cli.launching.plan import LaunchPlan, launcher_arguments
from moc_cli.processes import PARENT
from moc_cli.report.output import say
from moc_cli.signals import STOPS, EndedBySignal, Stopped, handled, heeded

ChildProgress = Callable[[], tuple[str, str | None]]
OTHER_MACHINE = "the processes on this machine have ended; machine 0 says why"


class Forwarded:
    """The signals that came to this process; each goes on to the processes that it has started."""

    def __init__(self) -> None:
        self.number: int | None = None

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Send a signal on, once; where nothing runs yet, it ends this process."""
        self.number = number
        children = psutil.Process().children()
        if not children:
            raise KeyboardInterrupt if number == signal.SIGINT else Stopped(number)
        for child in children:
            child.send_signal(number)


def start(
    plan: LaunchPlan, command: Sequence[str], *, seconds: int, progress: ChildProgress
) -> int:
    """Run `moc COMMAND` in the processes of a plan; return the exit code of the whole.

    `progress` says how far they came, and how to continue. Raises EndedBySignal where a signal
    ended a process, MocError where the machines do not meet within `seconds`.
    """
    from accelerate.commands.launch import launch_command_parser, multi_gpu_launcher
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launcher_arguments(plan, command)
    launch_options = launch_command_parser().parse_args(arguments)
    launch_options.num_cpu_threads_per_process = os.environ.get(
        THREADS, threads_of_each(plan.local_processes)
    )
    launch_options.rdzv_conf = f"timeout={seconds}"
    launch_options.signals_to_handle = "SIGQUIT"  # the others are forwarded here
    os.environ[PARENT] = str(os.getpid())
    forwarded = Forwarded()
    with handled(forwarded.forward, heeded((signal.SIGINT, *STOPS))), _quiet_launcher():
        try:
            multi_gpu_launcher(launch_options)
        except ChildFailedError as error:
            ends = {rank: failure.exitcode for rank, failure in error.failures.items()}
            return explain_ends(ends, plan, forwarded.number, progress)
        except (DistError, ConnectionError) as error:
            raise MocError(
                f"{plan.machines} machines have not met at {plan.ip}:{plan.port}: "
                f"{str(error).strip().partition(chr(10))[0]}",
                "start the same command on each within launch.ddp_timeout, with its own "
                "launch.machine_rank",
            ) from error
        finally:
            del os.environ[PARENT]
    return 0


def explain_ends(
    ends: Mapping[int, int], plan: LaunchPlan, forwarded: int | None, progress: ChildProgress
) -> int:
    """Return the exit code for processes that failed, as of one; raise EndedBySignal
    where no process has reported the signal.

    `ends` holds exit codes by rank, negative for a signal. When one process fails, the launcher
    ends the others with SIGTERM.
    """
    killed = {r: -end for r, end in ends.items() if end < 0 and end != -signal.SIGTERM}
    ended = 128 + signal.SIGTERM
    codes = sorted((end for end in ends.values() if end > 0), key=lambda code: code == ended)
    if forwarded is not None:
        if 128 + forwarded not in codes:
            say(f"stopped by signal {forwarded}")
        return 128 + forwarded
    if not killed and codes:
        if plan.rank > 0 and codes[0] < 128:
            say(OTHER_MACHINE)
        return codes[0]
    reached, hint = progress()
    rank, number = min(killed.items(), default=(min(ends), signal.SIGTERM))
    event = f"process {rank} on {processes.host_name()} was ended by {signal.Signals(number).name}"
    why = "; the system does so when memory runs out" if number == signal.SIGKILL else ""
    raise EndedBySignal(f"{event}{reached}{why}", hint, number)


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Within it torch's launcher logs nothing: its tables of errors repeat what is said already."""
    previous_level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(previous_level)
