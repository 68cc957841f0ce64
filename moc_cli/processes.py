"""A command runs in one process, whatever a launcher says."""

import os

from moc_cli.errors import MocError

# How launchers say to each process of how many it is one: torchrun and accelerate, MPI.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def check_one_process() -> None:
    """Raise MocError where a launcher started several processes, which would all do the same."""
    for name in WORLD_SIZES:
        value = os.environ.get(name, "")
        if value.isdecimal() and int(value) > 1:
            raise MocError(
                f"moc runs in one process, and a launcher started several: {name}={value}",
                "start it without torchrun, accelerate launch or mpirun",
            )
