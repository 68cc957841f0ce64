"""The shipped quickstart learns something that holds for facts it was never asked about.

Two complete runs, as a user makes them, that differ in their seed only: the first is the README's.
"""

import json
import math
import re
from statistics import mean, stdev

import pytest
import torch
from support.machine import ROOT, share_of_the_cores

from moc_cli.cli import run
from moc_cli.data.suites import load_examples

SEEDS = (42, 0)  # the recipe's own, and another
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


def test_the_readme_shows_what_it_learns(runs):
    """Within four standard errors of the score: routes differ with the processor."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"^ +world +accuracy +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", readme, re.M)
    before, value, stderr, majority, items = map(float, shown.groups())
    score = world(runs[0])
    assert score["n"] == items
    assert 100 * score["before"] == pytest.approx(before, abs=0.5)
    assert 100 * score["majority"] == pytest.approx(majority, abs=0.05)
    assert 100 * score["value"] == pytest.approx(value, abs=4 * stderr)


def test_the_scored_questions_were_never_trained_on():
    seen = {e.eval_prompt for e in load_examples("builtin", "world", "train")}
    assert not seen & {e.eval_prompt for e in load_examples("builtin", "world", "test")}
