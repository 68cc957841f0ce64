"""What counting routes costs a training step: `python tests/benchmarks/recording.py`.

One model trains in one process, and takes each step's rows three times, in changing order: with the
count, without it, and without it once more. The first two give the ratio; the last two, which do
the same, show what the machine's own unrest makes of a ratio of 1. A pair is the sum of some steps
and of the log line that ends them; timed is the process's CPU time, on one thread.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, permutations
from pathlib import Path

import numpy as np
import torch
from spread import ratio_interval

from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build
from moc_cli.training.accelerator import make_accelerator
from moc_cli.training.checkpoint import Checkpoints
from moc_cli.training.interrupt import Interrupt
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop import Loop

ARMS = ("counted", "plain", "plain again")


def make(recipe: Recipe, folder: Path) -> Loop:
    """A training that is ready for its first step."""
    accelerator = make_accelerator(recipe.launch, (), folder)
    recipe, rows = build.read_rows(recipe)
    tokenizer = build.make_tokenizer(recipe.model)
    adapted = build.build(recipe, accelerator.device).adapted
    given = build.encode_rows(recipe, rows, tokenizer).data
    log, checkpoints = MetricsLog(folder / "metrics.jsonl"), Checkpoints(folder, None)
    loop = Loop(
        adapted,
        given,
        build.make_settings(recipe),
        accelerator=accelerator,
        checkpoints=checkpoints,
        log=log,
        identity={},
        evaluate=None,
        interrupt=Interrupt(),
        command="",
    )
    loop.begin(None)
    return loop


def block(loop: Loop, recorders: dict, steps: int, orders: Iterator) -> dict[str, float]:
    """Time of some steps and their log line with each recorder, which take turns at every step."""
    times = dict.fromkeys(recorders, 0.0)
    for step in range(1, steps + 1):
        counters = replace(loop.counters)
        for arm in next(orders):
            loop.counters, loop.recorder = replace(counters), recorders[arm]
            loop.plan, loop.marked = loop.data.batches.epoch(counters.epoch), counters
            begin = time.process_time()
            loop.train_step()
            if step == steps:
                loop.write_line()
            times[arm] += time.process_time() - begin
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--pairs", type=int, default=40, help="at least 10")
    parser.add_argument("--steps", type=int, default=10, help="of one pair, with one log line")
    parser.add_argument("--set", action="append", default=[], help="change the recipe")
    given = parser.parse_args()
    if given.pairs < 10:
        parser.error("--pairs must be at least 10")
    torch.set_num_threads(1)
    recipe = load_recipe(given.recipe, ["train.max_steps=100000", *given.set])
    orders = cycle(permutations(ARMS))
    with tempfile.TemporaryDirectory() as name:
        loop = make(recipe, Path(name))
        recorders = dict.fromkeys(ARMS) | {"counted": loop.recorder}
        block(loop, recorders, 3, orders)
        times = [block(loop, recorders, given.steps, orders) for _ in range(given.pairs)]
        lines = Path(name, "metrics.jsonl").read_text().splitlines()
    counted, plain, again = (np.array([one[arm] for one in times]) for arm in ARMS)
    print(
        json.dumps(
            vars(given)
            | {
                "torch": torch.__version__,
                "log lines, of them with a count": [
                    len(lines),
                    sum("routing" in line for line in lines),
                ],
                "seconds a step": round(float(plain.mean()) / given.steps, 5),
                "counted / plain": ratio_interval(counted / plain),
                "plain again / plain": ratio_interval(again / plain),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
