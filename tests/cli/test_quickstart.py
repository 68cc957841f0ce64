"""The shipped quickstart learns something that holds for facts it was never asked about.

A complete run, as a user makes it, is the README's; another seed takes a third of its steps at
twice the rate, and is scored on fewer questions.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.machine import ROOT, share_of_the_cores

from moc_cli.cli import run
from moc_cli.data.suites import load_examples

SHORT = {"seed": 0, "train.max_steps": 100, "train.learning_rate": 0.01}
SHORT |= {"eval.max_samples": 200, "eval.before": False}  # the base is the same: it is scored once
Z_95 = 1.645


def train(folder: Path, **changes: Any) -> dict[str, Any]:
    """Train, and return the accuracy's entry."""
    torch.set_num_threads(share_of_the_cores())
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    assert run(["train", "quickstart", "--json", "--output-dir", str(folder), *sets]) == 0
    results = json.loads((folder / "results.json").read_text())
    return results["tasks"]["world"]["metrics"]["accuracy"]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(tmp_path_factory.mktemp("runs") / "complete")


def test_it_generalises_with_any_seed(complete: dict[str, Any], tmp_path: Path) -> None:
    """The lower bound of 95 % over the questions lies above what takes no training."""
    for score in (complete, train(tmp_path / "short", **SHORT)):
        value, n = score["value"], score["n"]
        rivals = [complete["before"], complete["majority"], score["majority"]]
        bound = value - Z_95 * (value * (1 - value) / n) ** 0.5
        print(f"after {value:.3f}, n {n}, bound {bound:.3f}, rivals {max(rivals):.3f}")
        assert n >= 200
        assert bound > max(rivals)


def test_the_readme_shows_what_it_learns(complete: dict[str, Any]) -> None:
    """Within four standard errors of the score: routes differ with the processor."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.search(r"^ +world +accuracy +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", readme, re.M)
    before, value, stderr, majority, items = map(float, shown.groups())
    assert complete["n"] == items
    assert 100 * complete["before"] == pytest.approx(before, abs=0.5)
    assert 100 * complete["majority"] == pytest.approx(majority, abs=0.05)
    assert 100 * complete["value"] == pytest.approx(value, abs=4 * stderr)


def test_the_scored_questions_were_never_trained_on() -> None:
    seen = {e.eval_prompt for e in load_examples("builtin", "world", "train")}
    assert not seen & {e.eval_prompt for e in load_examples("builtin", "world", "test")}
