"""The shipped quickstart learns something that holds for facts it was never asked about.

Two complete runs, as a user makes them, that differ in their seed only.
"""

import json
import math
from statistics import mean, stdev

import pytest
import torch
from support.machine import share_of_the_cores

from moc_cli.cli import run
from moc_cli.data.suites import load_examples

SEEDS = (0, 1)
T_95 = 6.314  # one-sided 95 % of Student's t with one degree of freedom
Z_95 = 1.645


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list:
    torch.set_num_threads(share_of_the_cores())
    folders = [tmp_path_factory.mktemp("runs") / f"seed-{seed}" for seed in SEEDS]
    for seed, folder in zip(SEEDS, folders, strict=True):
        changes = ["--set", f"seed={seed}", "--output-dir", str(folder)]
        # The base model is the same for all; it is scored once.
        changes += ["--set", f"eval.before={str(seed == SEEDS[0]).lower()}"]
        assert run(["train", "quickstart", "--json", *changes]) == 0
    return folders


def world(folder) -> dict:
    return json.loads((folder / "results.json").read_text())["tasks"]["world"]["metrics"][
        "accuracy"
    ]


def test_it_generalises_over_seeds(runs):
    scores = [world(folder) for folder in runs]
    values = [score["value"] for score in scores]
    n, rivals = scores[0]["n"], [scores[0]["before"], scores[0]["majority"]]
    over_seeds = mean(values) - T_95 * stdev(values) / math.sqrt(len(values))
    over_rows = min(v - Z_95 * math.sqrt(v * (1 - v) / n) for v in values)
    print(f"after {values}, n {n}, bounds {over_seeds:.3f} {over_rows:.3f}, rivals {max(rivals)}")
    assert n >= 300
    assert min(over_seeds, over_rows) > max(rivals)


def test_the_scored_questions_were_never_trained_on():
    seen = {e.eval_prompt for e in load_examples("builtin", "world", "train")}
    assert not seen & {e.eval_prompt for e in load_examples("builtin", "world", "test")}
