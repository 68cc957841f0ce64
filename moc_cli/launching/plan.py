"""How many processes a command starts, where, and why."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from yaml import YAMLError

from moc_cli.errors import MocError, system_reason
from moc_cli.launching.place import USUAL_PORT
from moc_cli.recipe.launch import LaunchSection

KEY = "launch.num_processes"
SET = f"--set {KEY}="  # of `moc train`; other commands have an option of their own


@dataclass(frozen=True)
class LaunchPlan:
    """`processes` in all, equally many on each of `machines`, of which this one is `rank`.

    `why` says who chose their number. `port` 0 is a free one; `gpu_ids` is "all" or a list with
    commas.
    """

    processes: int
    why: str
    machines: int = 1
    rank: int = 0
    ip: str | None = None
    port: int = 0
    gpu_ids: str = "all"

    @property
    def local_processes(self) -> int:
        """The number of processes on this machine."""
        return self.processes // self.machines


def make_plan(launch: LaunchSection, key: str = SET) -> LaunchPlan:
    """Choose by the recipe, else by accelerate's configuration file, else one for each GPU.

    Raises MocError where this machine has too few GPUs for it; `key` chooses their number on the
    command line.
    """
    import torch

    on_gpu = launch.device != "cpu" and torch.cuda.is_available()
    gpus = torch.cuda.device_count() if on_gpu else 0
    plan = _chosen(launch, gpus, key)
    count = plan.local_processes
    if on_gpu and count > gpus:
        name = KEY if key == SET else key.strip()
        why = name if plan.why == KEY else plan.why
        raise MocError(
            f"{name}: {count} processes on this machine ({why}), which has {_gpus(gpus)}",
            f"use {key}{gpus * plan.machines}",
        )
    return plan


def _chosen(launch: LaunchSection, gpus: int, key: str) -> LaunchPlan:
    machines, port = launch.num_machines, launch.main_process_port
    if port is None:
        port = USUAL_PORT if machines > 1 else 0
    place: dict[str, Any] = {
        "machines": machines,
        "rank": launch.machine_rank,
        "ip": launch.main_process_ip,
        "port": port,
    }
    if launch.num_processes != "auto":
        return LaunchPlan(launch.num_processes, KEY, **place)
    configured = _configured(key, on_gpu=gpus > 0) if machines == 1 else None
    if configured is not None:
        return configured
    if gpus:
        on_machines = f" on each of {machines} machines" if machines > 1 else ""
        return LaunchPlan(gpus * machines, f"{_gpus(gpus)}{on_machines}", **place)
    return LaunchPlan(machines, "no GPU", **place)


def _configured(key: str, *, on_gpu: bool) -> LaunchPlan | None:
    """Return what `accelerate config` has written, or None where there is nothing to go by."""
    from accelerate.commands import config as accelerate

    file = accelerate.default_config_file
    if not os.path.isfile(file):
        return None
    try:
        config: Any = accelerate.load_config_from_file(file)
        processes, machines = int(config.num_processes), int(config.num_machines)
        if not on_gpu and not config.use_cpu:  # written for GPUs
            return None
        return LaunchPlan(
            max(processes, 1),
            file,
            machines=machines,
            rank=int(config.machine_rank),
            ip=config.main_process_ip,
            port=config.main_process_port or (USUAL_PORT if machines > 1 else 0),
            gpu_ids=config.gpu_ids or "all",
        )
    except (OSError, ValueError, TypeError, AttributeError, YAMLError) as error:
        reason = system_reason(error) or " ".join(str(error).split())
        raise MocError(
            f"{file}: not a configuration of local processes: {reason}",
            f"write it again with accelerate config, or say {key}N",
        ) from error


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def launcher_arguments(plan: LaunchPlan, command: Sequence[str]) -> list[str]:
    """Return the arguments of `accelerate launch` that start `moc COMMAND` by this plan."""
    place = ["--num_machines", str(plan.machines), "--machine_rank", str(plan.rank)]
    if plan.ip is not None:
        place += ["--main_process_ip", plan.ip]
    return [
        *("--num_processes", str(plan.processes), *place),
        *("--main_process_port", str(plan.port), "--gpu_ids", plan.gpu_ids),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--same_network"),
        *("--module", "moc_cli", *command),
    ]
