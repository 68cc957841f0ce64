"""The device of a run, and its place among processes that train together.

The recipe alone says how to train: of a launcher's variables those count that name the place.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from moc_cli.errors import MocError
from moc_cli.processes import USUAL, WORLD_SIZES, Processes, current, join, launched
from moc_cli.recipe.launch import LaunchSection
from moc_cli.report.output import say
from moc_cli.training.device_checks import find_device, gpu_problem

PREFIX = "ACCELERATE_"
# What would change a training.
CHANGING = (
    "CPU_AFFINITY",
    "DYNAMO_BACKEND",
    "GRADIENT_ACCUMULATION_STEPS",
    "MIXED_PRECISION",
    "TORCH_DEVICE",
    "USE_CPU",
    "USE_DEEPSPEED",
    "USE_FSDP",
    "USE_MEGATRON_LM",
    "USE_PARALLELISM_CONFIG",
)
# Values that change nothing: switches that are off, and one micro-batch a step.
OFF = ("", "no", "false", "0")
ONE_BATCH = ("GRADIENT_ACCUMULATION_STEPS", "1")


def make_accelerator(launch: LaunchSection, report_to: Sequence[str], folder: Path) -> Accelerator:
    """Choose the device and the number of threads; trackers write below `folder`.

    Raises MocError as `join_launched` does.
    """
    join_launched(launch)
    if launch.num_threads is not None:
        processors = os.cpu_count() or 1
        if launch.num_threads > processors:
            say(f"launch.num_threads: {launch.num_threads}, but the machine has {processors}")
        torch.set_num_threads(min(launch.num_threads, processors))
    with _without_launcher() as hidden:
        _say_not_used(hidden)
        return Accelerator(
            cpu=find_device(launch.device).type == "cpu",
            mixed_precision="no",
            log_with=list(report_to) or None,
            project_dir=folder,
        )


def join_launched(launch: LaunchSection) -> Processes:
    """Connect this process with the others that a launcher has started, if it has not been yet.

    Raises MocError when the recipe asks for a GPU that is not there.
    """
    problem = gpu_problem(launch.device)
    if problem is not None:
        raise MocError(problem, "use --set launch.device=cpu or auto")
    if current().world > 1:
        return current()
    with _without_launcher():
        cpu = find_device(launch.device).type == "cpu"
        return join(cpu=cpu, seconds=launch.ddp_timeout)


@contextmanager
def _without_launcher() -> Iterator[dict[str, str]]:
    """Within it accelerate finds no variable that would change what the recipe says; yields them.

    Alone, a process finds none of several processes either, such as a LOCAL_RANK without others.
    """
    place = () if launched() > 1 else (*USUAL, *WORLD_SIZES)
    names = [name for name in os.environ if name.startswith(PREFIX) or name in place]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield hidden
    finally:
        os.environ.update(hidden)


def _say_not_used(hidden: Mapping[str, str]) -> None:
    changing = {name: hidden[f"{PREFIX}{name}"] for name in CHANGING if f"{PREFIX}{name}" in hidden}
    ignored = [
        pair for pair in changing.items() if pair[1].lower() not in OFF and pair != ONE_BATCH
    ]
    if ignored:
        variables = ", ".join(f"{PREFIX}{name}" for name, _ in ignored)
        say(f"ignored, as the recipe sets them: {variables}")
