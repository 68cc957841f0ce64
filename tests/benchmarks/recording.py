"""What counting routes costs a training step, pair by pair: `python tests/benchmarks/recording.py`.

One process trains the quickstart's model twice from the same state; each pair of blocks of steps
is run with and without the count, in alternating order, so that a busy machine slows both. Printed
is the mean ratio of the times with its 95 % interval; the bound is the upper end.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moc_cli.data.encode import encode_train
from moc_cli.data.suites import load_examples
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build
from moc_cli.training.checkpoint import Checkpoints
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop import _Loop
from moc_cli.training.rows import training_data
from moc_cli.training.usage import Usage

T_95 = {9: 2.262, 11: 2.201, 14: 2.145, 19: 2.093, 24: 2.064, 29: 2.045, 39: 2.023}


def make(recipe: Recipe, folder: Path, *, counted: bool) -> _Loop:
    """A training that is ready for its first step."""
    accelerator = build.make_accelerator(recipe.launch, (), folder)
    data = recipe.data
    rows = [
        row
        for task in data.tasks
        for row in load_examples(data.suite, task, "train", path=data.path)
    ]
    tokenizer = build.make_tokenizer(recipe.model)
    adapted = build.build(recipe, accelerator.device).adapted
    encoded = encode_train(
        rows,
        tokenizer,
        max_length=data.max_length,
        train_on_inputs=data.train_on_inputs,
    )
    given = training_data(
        encoded,
        tokenizer,
        kind="causal",
        batch_size=recipe.train.per_device_train_batch_size,
        seed=recipe.seed,
        group_by_length=recipe.train.group_by_length,
    )
    log = MetricsLog(folder / "metrics.jsonl")
    folder.mkdir()
    settings = build.make_settings(recipe)
    checkpoints = Checkpoints(folder / "checkpoints", None)
    loop = _Loop(adapted, given, settings, accelerator, checkpoints, log)
    if not counted:
        loop.usage = Usage(None)
    loop.scorer = None
    loop.usage.__enter__()
    loop.begin(None)
    return loop


def seconds(loop: _Loop, steps: int) -> float:
    """Time of some steps, their log line included."""
    begin = time.process_time()
    for _ in range(steps):
        loop.train_step()
    loop.write_line()
    return time.process_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="quickstart")
    parser.add_argument("--pairs", type=int, choices=[n + 1 for n in T_95], default=20)
    parser.add_argument("--steps", type=int, default=10, help="a block, and a log line")
    parser.add_argument("--set", action="append", default=[], help="change the recipe")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, ["train.max_steps=100000", *given.set])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        loops = [make(recipe, Path(name, str(c)), counted=c) for c in (False, True)]
        for loop in loops:
            seconds(loop, 3)
        ratios = []
        for pair in range(given.pairs):
            times = [0.0, 0.0]
            for which in (0, 1) if pair % 2 else (1, 0):
                times[which] = seconds(loops[which], given.steps)
            ratios.append(times[1] / times[0])
        logs = [Path(name, str(counted), "metrics.jsonl") for counted in (False, True)]
        lines = [log.read_text().splitlines() for log in logs]
    ratio = np.array(ratios)
    half = T_95[len(ratio) - 1] * ratio.std(ddof=1) / len(ratio) ** 0.5
    print(
        json.dumps(
            vars(given)
            | {
                "lines with a count": [sum("routing" in line for line in part) for part in lines],
                "mean ratio": round(float(ratio.mean()), 4),
                "upper 95 % bound": round(float(ratio.mean() + half), 4),
                "ratios": [round(float(r), 4) for r in ratio],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
