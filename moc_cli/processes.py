"""The processes that run one command together; the first one prints and writes.

`current()` is this process among them: alone, until `join` has connected it with the others.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

from moc_cli.errors import MocError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# Of each launcher: how many processes there are, which one this is, which on its machine, and how
# many are on its machine.
TORCHRUN = "torchrun or accelerate launch"
VARIABLES = {
    TORCHRUN: ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpirun": (
        *("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        *("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ),
    "mpirun of MVAPICH": (
        *("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
        *("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ),
    "mpirun of MPICH or Intel MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", ""),
}
USUAL = VARIABLES[TORCHRUN]
WORLD_SIZES = [names[0] for names in VARIABLES.values()]

# The `moc` that has started this process, as one of several or as a run of a sweep.
PARENT = "MOC_PARENT"


class Elsewhere(MocError):
    """An error that another process has found and prints; this one ends with it."""


class LostProcess(MocError):
    """Another process has ended, or has not answered in time.

    `stopped_by` is the signal that asked this process to stop before it noticed, if one did: a
    launcher that has seen the loss first ends the others so.
    """

    stopped_by: int | None = None


@dataclass(frozen=True)
class Processes:
    """One of `world` processes, by `rank`. What is called joint here, all of them must call.

    Joint calls raise LostProcess where another process has ended, or has not come to the same call
    within `seconds`. What is counted of all is counted where `counts`.
    """

    rank: int = 0
    world: int = 1
    seconds: float = 1800.0
    counts: bool = True

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The items that this process works on: of all processes together each item once."""
        return items[self.rank :: self.world]

    def sum(self, values: "Tensor") -> None:
        """Replace a tensor by its sum over the processes; joint."""
        if self.world > 1:
            from torch import distributed

            with self._joint():
                distributed.all_reduce(values)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank; joint."""
        if self.world == 1:
            return [value]
        from torch import distributed

        values: list[T | None] = [None] * self.world
        with self._joint():
            distributed.all_gather_object(values, value)
        return cast(list[T], values)

    def reported_by_main(self, error: MocError) -> MocError:
        """An error that all processes meet, to be raised: only the first one tells it."""
        return error if self.main else Elsewhere(error.message, error.hint)

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the first process alone do the work; all get its result, or its error. Joint."""
        if self.world == 1:
            return work()
        value: Any = None
        with self.main_first():
            if self.main:
                value = work()
        return cast(T, self._from_main(value))

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Within it the first process works alone; the others follow when it is done. Joint.

        An error of the first one ends all.
        """
        if self.world == 1:
            yield
            return
        if not self.main:
            error = self._from_main(None)
            if error is not None:
                raise Elsewhere(*error)
            yield
            return
        try:
            yield
        except BaseException as error:
            self._from_main((str(error), getattr(error, "hint", None)))
            raise
        self._from_main(None)

    def collect(self, work: Callable[[], T]) -> list[T]:
        """Let each process do its work; return what it gave in all of them, by rank. Joint.

        An error that one process meets ends all; the first one tells it. Nothing in the work may be
        joint.
        """
        if self.world == 1:
            return [work()]
        value, error = None, None
        try:
            value = work()
        except MocError as caught:
            error = caught
        report = None if error is None else (error.message, error.hint, host_name())
        done = self.gather((value, report))
        for rank, (_, failure) in enumerate(done):
            if failure is None:
                continue
            if error is not None and self.main:
                raise error
            message, hint, host = failure
            kind = MocError if self.main else Elsewhere
            raise kind(f"process {rank} on {host}: {message}", hint)
        return [cast(T, value) for value, _ in done]

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error within it that one process meets ends all, as in `collect`. Joint."""
        error: MocError | None = None
        try:
            yield
        except MocError as caught:
            error = caught

        def end() -> None:
            if error is not None:
                raise error

        self.collect(end)

    def _from_main(self, value: Any) -> Any:
        """Return the first process's value in all of them."""
        from torch import distributed

        values = [value]
        with self._joint():
            distributed.broadcast_object_list(values, src=0)
        return values[0]

    @contextmanager
    def meeting(self) -> Iterator[None]:
        """Within it processes may meet in the middle of a model: raises LostProcess as joint calls
        do.
        """
        try:
            yield
        except RuntimeError as error:
            if not _is_of_a_meeting(error):
                raise
            with self._joint():
                raise

    @contextmanager
    def _joint(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # each backend has its own words for it
            import torch

            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise LostProcess(
                f"process {self.rank} of {self.world} on {host_name()} waited for another one, "
                f"which has ended or did not answer for {self.seconds:g} s ({_reason(error)})",
                "look for the first error among all processes; a longer wait: "
                "--set launch.ddp_timeout=SECONDS",
            ) from error


def _reason(error: RuntimeError) -> str:
    """Return the first sentence, without the line of the backend's own code."""
    line = str(error).strip().partition("\n")[0]
    return re.sub(r"^\[\S+:\d+\] ", "", line).partition(". ")[0]


def host_name() -> str:
    """The name of this machine."""
    import socket  # imported late: it takes a tenth of a short command

    return socket.gethostname()


def _is_of_a_meeting(error: RuntimeError) -> bool:
    """Whether torch raised it where processes wait for each other."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module: str = "" if place is None else place.tb_frame.f_globals.get("__name__", "")
    return module.startswith("torch.distributed.")


_current = Processes()


def current() -> Processes:
    """This process among those of the command."""
    return _current


@contextmanager
def working_as(processes: Processes) -> Iterator[None]:
    """Within it `processes` is what `current` returns."""
    global _current
    previous, _current = _current, processes
    try:
        yield
    finally:
        _current = previous


@contextmanager
def same_work() -> Iterator[None]:
    """Within it all processes do the same work, which counts in the first alone."""
    with working_as(replace(_current, counts=_current.main)):
        yield


def join(*, cpu: bool, seconds: float) -> Processes:
    """Connect this process with the others that a launcher has started, if there are any.

    Raises LostProcess where they do not meet within `seconds`.
    """
    global _current
    if launched() > 1:
        from accelerate.state import AcceleratorState, PartialState
        from torch import distributed

        if not distributed.is_initialized():  # what accelerate found when this was alone
            AcceleratorState._reset_state(reset_partial_state=True)
        try:
            state = PartialState(cpu=cpu, timeout=timedelta(seconds=seconds))
        except RuntimeError as error:  # each backend has its own words for it
            rank, place = os.environ.get("RANK"), os.environ.get("MASTER_ADDR")
            raise LostProcess(
                f"process {rank} of {launched()} on {host_name()} did not meet the others within "
                f"{seconds:g} s at {place}, port {os.environ.get('MASTER_PORT')} "
                f"({_reason(error)})",
                "process 0 must run at MASTER_ADDR; another port: export MASTER_PORT=NUMBER; a "
                "longer wait: --set launch.ddp_timeout=SECONDS",
            ) from error
        _current = Processes(state.process_index, state.num_processes, seconds)
    return _current


def leave() -> None:
    """Be alone again, at the end of a command."""
    global _current
    if _current.world > 1:
        from accelerate.state import AcceleratorState
        from torch import distributed

        distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    _current = Processes()


def launched() -> int:
    """Return how many processes a launcher has started together with this one."""
    sizes = (os.environ.get(name, "") for name in WORLD_SIZES)
    return next((int(size) for size in sizes if size.isdecimal() and int(size) > 1), 1)


def check_one_process(command: str) -> None:
    """Raise MocError where a launcher started several processes, which would all do the same."""
    if launched() > 1:
        name = next(name for name in WORLD_SIZES if os.environ.get(name) == str(launched()))
        raise MocError(
            f"moc {command} runs in one process, and a launcher started several: "
            f"{name}={launched()}",
            "start it without torchrun, accelerate launch, mpirun or srun",
        )
