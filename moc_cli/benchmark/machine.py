"""Whether the machine is free to be measured on."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from moc_cli.errors import MocError
from moc_cli.report.numbers import byte_size

OTHERS = 2 * 2**30  # bytes on a GPU that are no sign of other work: contexts, a desktop
BUSY = 10  # percent of a GPU's time
LOADED = 20  # percent of the processors' time

Clock = Callable[[], float]


def check_idle(device: torch.device) -> dict[str, Any]:
    """Return how busy the device is, before the benchmark itself does anything.

    Raises MocError for a GPU with work or memory of others.
    """
    if device.type != "cuda":
        return {"cpu_percent": psutil.cpu_percent(interval=0.3)}
    free, total = torch.cuda.mem_get_info(device)
    bytes_of_others = total - free - torch.cuda.memory_reserved(device)
    used = utilization(device)
    wait = "wait until it is free, or choose another one: CUDA_VISIBLE_DEVICES"
    if bytes_of_others > OTHERS:
        raise MocError(
            f"the GPU is in use: others hold {byte_size(bytes_of_others)} of its memory", wait
        )
    if used is not None and used > BUSY:
        raise MocError(f"the GPU is in use: it is busy for {used} % of the time", wait)
    return {"gpu_percent": used, "gpu_bytes_of_others": bytes_of_others}


def choose_clock(load: dict[str, Any]) -> tuple[Clock, str, str | None]:
    """Return a clock, what it shows, and what is to be said of a busy CPU.

    Beside other work the time that passes says little: then the processors' time of this program
    is taken, of all its threads together.
    """
    percent = load.get("cpu_percent") or 0
    if percent <= LOADED:
        return time.perf_counter, "elapsed", None
    return (
        time.process_time,
        "processor",
        f"other work keeps the processors busy for {percent:.0f} % of the time: times are "
        "processor time of this program, not elapsed time",
    )


def utilization(device: torch.device) -> int | None:
    """Return for how many percent of the last moment a GPU was busy; None where unknown."""
    identifier = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            ["nvidia-smi", "-i", identifier, *query],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return int(done.stdout.strip())
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
