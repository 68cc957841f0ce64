"""Bytes that processes send each other on this machine, beside the formula of `moc plan`.

    unshare --user --map-root-user --net sh -c 'ip link set lo up; python tests/benchmarks/wire.py'

Processes sum a buffer over gloo, or gather it; with --train they train the quickstart: what twelve
more steps send more is divided by twelve. The bytes are those that the kernel counted on the
loopback interface; in a network namespace of its own nothing else passes there. They include the
headers of TCP and IP and the packets that acknowledge others.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from support.group import run_together
from torch import distributed

from moc_cli.planning.batches import Rows
from moc_cli.planning.links import FLOAT, Traffic, all_gather, all_reduce
from moc_cli.planning.plans import Planner
from moc_cli.processes import Processes
from moc_cli.recipe.load import load_recipe

NUMBERS = {"quickstart": 27_905, "llama2-7b": 34_619_393}  # that are trained with moc
REPEATS = 3
STEPS = 12


def passed() -> tuple[int, int]:
    """Bytes and packets that the loopback interface has carried."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next(line.split() for line in lines if line.split()[0] == "lo:")
    return int(fields[1]), int(fields[2])


def summed(numbers: int) -> None:
    distributed.all_reduce(torch.ones(numbers))


def gathered(numbers: int, world: int) -> None:
    share = torch.ones(numbers // world)
    distributed.all_gather(list(torch.empty(world, len(share))), share)


def measure(group: Processes, call: str, model: str) -> None:
    numbers, world = NUMBERS[model], group.world

    def act() -> None:
        summed(numbers) if call == "all_reduce" else gathered(numbers, world)

    act()
    distributed.barrier()
    before, started = passed(), time.perf_counter()
    for _ in range(REPEATS):
        act()
    distributed.barrier()
    if group.main:
        seconds = (time.perf_counter() - started) / REPEATS
        size, packets = (b - a for a, b in zip(before, passed(), strict=True))
        formula: Traffic = {"all_reduce": all_reduce, "all_gather": all_gather}[call](
            FLOAT * numbers, world
        )
        each = size / world / REPEATS
        line = {"call": call, "model": model, "processes": world, "bytes": round(each)}
        line |= {"formula": formula.sent, "ratio": round(each / formula.sent, 4)}
        line |= {"packets": round(packets / world / REPEATS), "seconds": round(seconds, 3)}
        print(json.dumps(line), flush=True)


def train(recipe: list[str], world: int, steps: int) -> int:
    """Train so many steps in processes that torchrun starts; return the bytes that passed."""
    before, _ = passed()
    with TemporaryDirectory() as folder:
        launcher = ["torch.distributed.run", "--nproc-per-node", str(world), "-m", "moc_cli"]
        changes = [*recipe, f"train.max_steps={steps}", f"output.output_dir={folder}/run"]
        told = [word for change in changes for word in ("--set", change)]
        command = [sys.executable, "-m", *launcher, "train", "quickstart", *told]
        subprocess.run(command, check=True, capture_output=True)
    return passed()[0] - before


def measure_training(strategy: str, world: int) -> None:
    recipe = [f"launch.strategy={strategy}", "launch.device=cpu", "output.save_strategy=no"]
    recipe += ["eval.before=false", "eval.max_samples=1", "output.logging_steps=100"]
    short, long = (train(recipe, world, steps) for steps in (4, 4 + STEPS))
    planned = Planner(None, Rows(None)).plan(
        load_recipe("quickstart", [*recipe, f"launch.num_processes={world}"])
    )
    each = (long - short) / world / STEPS
    line = {"train": strategy, "processes": world, "bytes": round(each)}
    line |= {"formula": planned.wire_bytes, "ratio": round(each / planned.wire_bytes, 4)}
    print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=NUMBERS, help="one size of those above")
    parser.add_argument("--train", action="store_true", help="steps of trainings instead")
    given = parser.parse_args()
    if given.train:
        for strategy in ("ddp", "fsdp2"):
            for world in (2, 3, 4):
                measure_training(strategy, world)
        return
    only = given.only
    for model in NUMBERS if only is None else [only]:
        for call in ("all_reduce", "all_gather"):
            for world in (2, 3, 4):
                run_together(measure, world, call, model)


if __name__ == "__main__":
    main()
