"""Several processes that work together, for tests: forked, connected over gloo."""

import gc
import os
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from moc_cli.processes import Processes, join, leave, working_as

SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def as_launched(rank: int, world: int, port: int) -> dict[str, str]:
    """The variables that torchrun sets for one of its processes."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _one(rank: int, work: Callable[..., Any], world: int, port: int, arguments: tuple) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # a collection would look through all that the parent has made
    os.environ |= as_launched(rank, world, port)
    try:
        work(join(cpu=True, seconds=SECONDS), *arguments)
    finally:
        leave()


def run_together(work: Callable[..., Any], world: int, *arguments: Any) -> None:
    """Call `work(processes, *arguments)` in `world` processes.

    They are forked: a fresh process would import torch and transformers again.
    """
    multiprocessing.start_processes(
        _one, (work, world, free_port(), arguments), world, start_method="fork"
    )


def alone() -> AbstractContextManager[None]:
    """Within it a process of a group works as if it were the only one."""
    return working_as(Processes())


def saved(folder: Path, world: int) -> list[Any]:
    """What each process has written to FOLDER/RANK.pt."""
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
