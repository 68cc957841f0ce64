"""The scores before training: of which model they are, and what becomes of them."""

from pathlib import Path
from typing import Any

import pytest
from support.rows import write_rows
from support.tiny_runs import save_model

from moc_cli.cli import run
from moc_cli.errors import DataError
from moc_cli.runs import RunFolder
from moc_cli.scoring.results import Evaluation
from moc_cli.training.session import Job, Session

RECIPE = """
model: {model_name_or_path: model}
method: molex
data: {suite: custom, path: rows.jsonl, format: text, held_out: 4, max_length: 32}
train: {max_steps: 1, per_device_train_batch_size: 2}
output: {output_dir: run, save_strategy: "no"}
launch: {device: cpu, num_threads: 1}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, texts and their recipe, as the working folder."""
    save_model(tmp_path / "model", "llama")
    write_rows(tmp_path / "rows.jsonl", [{"text": f"abab {n}"} for n in range(12)])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trained(*options: str) -> dict[str, Any]:
    """The results of a training with these options."""
    assert run(["train", "recipe.yaml", *options]) == 0
    return RunFolder("run").read_results()


def scores(results: dict[str, Any], key: str) -> dict[str, float]:
    (entry,) = results["tasks"].values()
    return {name: score[key] for name, score in entry["metrics"].items()}


def test_of_a_language_model_they_are_its_bases_whatever_the_seed(home):
    found = [scores(trained("--set", f"seed={seed}", "--overwrite"), "before") for seed in (1, 2)]
    assert run(["eval", "run", "--base"]) == 0
    (evaluation,) = RunFolder("run").read_evaluations().values()
    assert found == [scores(evaluation, "base")] * 2
    assert RunFolder("run").read_results()["tasks"].keys() == evaluation["tasks"].keys()


def test_a_task_that_is_not_scored_afterwards_keeps_them(home, monkeypatch):
    usual, labels = Session.score, []

    def score(self: Session, job: Job, task: str, label: str, progress: str) -> Evaluation:
        labels.append(label)
        if label == "after" and labels.count("after") == 1:
            raise DataError("this cannot be scored")
        return usual(self, job, task, label, progress)

    monkeypatch.setattr(Session, "score", score)
    command = ["train", "recipe.yaml", "--set", "method=control"]
    assert run(command) == 2
    known = RunFolder("run").read_scores_before()
    assert known.keys() == RunFolder("run").read_results()["unscored"].keys()
    assert run([*command, "--resume", "auto"]) == 0
    assert labels == ["before", "after", "after"]
    results = RunFolder("run").read_results()
    assert "before" not in results
    assert RunFolder("run").read_scores_before() == known


def test_what_is_not_known_is_scored_by_the_run_that_goes_on(home):
    first = trained("--set", "method=control", "--set", "eval.before=false")
    assert set(scores(first, "before").values()) == {None}
    second = trained("--set", "method=control", "--resume", "auto")
    assert scores(second, "before") == scores(trained("--overwrite"), "before")
