"""Where tests run: the checkout, its share of the cores, and what may be absent."""

import os
from pathlib import Path
from typing import NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def share_of_the_cores() -> int:
    """Threads for a long training; threads of several test processes on one core spin in vain."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1, (os.cpu_count() or 1) // processes)


def absent(reason: str) -> NoReturn:
    """Skip the test, or fail it where CI is set."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must have it: {reason}", pytrace=False)
    pytest.skip(reason)


def seed_torch(seed: int) -> None:
    """As torch.manual_seed, without the millisecond that it takes for a GPU that is not in use."""
    import torch

    if torch.cuda.is_initialized():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
