"""The section `launch` of a recipe: the device, the processes that train together, and how."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationError

from moc_cli.errors import MocError
from moc_cli.recipe.types import Count, Positive, Section, Text, Threads, refuse_bool

Port = Annotated[int, Field(ge=0, le=65535), BeforeValidator(refuse_bool)]


class LaunchSection(Section):
    """Where a run runs, with Accelerate's names of keys."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="where to run; auto: the GPU if there is one"
    )
    num_threads: Threads | None = Field(
        default=None,
        description="number of CPU threads of a process, at most the machine's; null: the choice "
        "of torch, or with several processes an equal share",
    )
    num_processes: Positive | Literal["auto"] = Field(
        default="auto",
        description="number of processes that train together, over all machines; each has a GPU "
        "of its own. auto: what a launcher says, else Accelerate's configuration file, else one "
        "for each GPU; on the CPU 1",
    )
    num_machines: Positive = Field(
        default=1, description="number of machines; the same command is started on each of them"
    )
    machine_rank: Count = Field(
        default=0, description="which of the machines this one is, from 0; 0 writes the run folder"
    )
    main_process_ip: Text | None = Field(
        default=None, description="address of machine 0; null: this machine"
    )
    main_process_port: Port | None = Field(
        default=None,
        description="port of machine 0 at which the processes meet; 0: a free one; null: a free "
        "one, and 29500 with several machines",
    )
    strategy: Literal["ddp", "fsdp2", "deepspeed"] = Field(
        default="ddp",
        description="how processes hold the base; ddp: each holds all of it; fsdp2: each holds a "
        "part; deepspeed: not supported, use fsdp2",
    )
    ddp_timeout: Positive = Field(
        default=1800, description="seconds that a process waits for another one"
    )


def launch_of_options(num_processes: str | None, device: str | None) -> LaunchSection:
    """Return what `--num-processes` and `--device` say; without the first it is one process.

    The device is checked elsewhere. Raises MocError for no such number.
    """
    number = 1 if num_processes is None else num_processes
    try:
        section = LaunchSection.model_validate({"num_processes": number})
    except ValidationError as error:
        raise MocError(
            f"--num-processes: found {num_processes!r}; allowed: auto or a whole number of at "
            "least 1"
        ) from error
    return section.model_copy(update={"device": device or "auto"})
