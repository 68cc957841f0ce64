"""A process's place among those that a launcher has started, by the launcher's variables."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from moc_cli.errors import MocError
from moc_cli.processes import TORCHRUN, USUAL, VARIABLES

MASTER, PORT, THREADS = "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"
USUAL_PORT = 29500  # of torchrun and accelerate
FIRST_HOST = '$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


@dataclass(frozen=True)
class ProcessRank:
    """One of `world` processes, by `rank`; by `local_rank` among the `local_world` of its machine.

    0 processes on its machine means that their number is not known.
    """

    launcher: str
    world: int
    rank: int
    local_rank: int
    local_world: int = 0


def find_place(environ: Mapping[str, str]) -> ProcessRank | None:
    """Return this process's place among several; None where it is the only one.

    Raises MocError where the variables say that there are others, and not which one this is.
    """
    launcher = _launcher(environ)
    if launcher is None or _number(environ, launcher, 0) == 1:
        return None
    world = _number(environ, launcher, 0)
    # srun also starts processes that find each other through MPI's variables.
    rank, local_rank = (_number(environ, launcher, index) for index in (1, 2))
    local_rank = _number(environ, "srun", 2) if local_rank is None else local_rank
    missing = [
        VARIABLES[launcher][index] for index, value in ((1, rank), (2, local_rank)) if value is None
    ]
    if world is None or rank is None or local_rank is None:
        name = VARIABLES[launcher][0]
        raise MocError(
            f"{name}={environ[name]} says that this is one of several processes; which of them "
            f"is not known without {' and '.join(missing)}",
            f"start them with torchrun or accelerate launch, or unset {name}",
        )
    local_world = _number(environ, launcher, 3) or 0
    if not local_world and environ.get("SLURM_STEP_NUM_NODES") == "1":
        local_world = world
    return ProcessRank(_name(environ, launcher, world, rank), world, rank, local_rank, local_world)


def known_place(environ: Mapping[str, str]) -> ProcessRank | None:
    """Return this process's place, or None where it is alone or its place is not known yet.

    What is wrong with a launcher's variables is reported when the command begins.
    """
    try:
        return find_place(environ)
    except MocError:
        return None


def take_place(environ: MutableMapping[str, str]) -> ProcessRank | None:
    """Set the variables of torchrun, by which processes find each other, and return the place.

    Raises MocError where nothing says on which machine the first process runs.
    """
    place = find_place(environ)
    if place is None:
        return None
    if MASTER not in environ:
        if place.local_world != place.world:
            raise MocError(
                f"{place.launcher} has started {place.world} processes, and {MASTER} does not say "
                "on which machine the first one is",
                f"export {MASTER}=ADDRESS; under SLURM: export {MASTER}={FIRST_HOST}",
            )
        environ[MASTER] = "127.0.0.1"
    environ.setdefault(PORT, str(USUAL_PORT))
    local_world = place.local_world or 1
    values = (place.world, place.rank, place.local_rank, local_world)
    environ.update(dict(zip(USUAL, map(str, values), strict=True)))
    environ.setdefault(THREADS, str(threads_of_each(local_world)))
    return place


def lone_launcher(environ: Mapping[str, str]) -> str | None:
    """Say which launcher has started this process alone; None where none has."""
    launcher = _launcher(environ)
    if launcher is not None:
        name = VARIABLES[launcher][0]
        return f"{name}={environ[name]}"
    if stray_variable(environ) is not None:
        return "WORLD_SIZE is not set"
    return "accelerate launch" if "ACCELERATE_MIXED_PRECISION" in environ else None


def stray_variable(environ: Mapping[str, str]) -> str | None:
    """Return a variable that names a place where none says how many processes there are."""
    names = (name for name in USUAL[1:] if name in environ)
    return next(names, None) if _launcher(environ) is None else None


def is_half_started(environ: Mapping[str, str]) -> bool:
    """Whether `accelerate launch --cpu` was asked for several processes, and started one."""
    several = MASTER in environ and environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    return several and lone_launcher(environ) == "accelerate launch"


def threads_of_each(processes: int) -> int:
    """Return the number of threads of each of several processes on this machine."""
    share = max(1, (os.cpu_count() or 1) // processes)
    return min(share, len(os.sched_getaffinity(0)))


def _launcher(environ: Mapping[str, str]) -> str | None:
    """Return the launcher whose variables say how many processes there are.

    Every shell under SLURM is a step of one task; that is no launcher.
    """
    for launcher in VARIABLES:
        world = _number(environ, launcher, 0)
        if world is not None and (world > 1 or launcher != "srun"):
            return launcher
    return None


def _name(environ: Mapping[str, str], launcher: str, world: int, rank: int) -> str:
    """Return who has started the processes: of MPI's and srun's `take_place` made torchrun's."""
    for name in VARIABLES if launcher == TORCHRUN else ():
        if name != TORCHRUN and [_number(environ, name, i) for i in (0, 1)] == [world, rank]:
            return name
    return launcher


def _number(environ: Mapping[str, str], launcher: str, index: int) -> int | None:
    text = environ.get(VARIABLES[launcher][index], "")
    return int(text) if text.isdecimal() else None
