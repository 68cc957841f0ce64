"""When a run of a sweep counts, which of its scores do, and what is refused before any training."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.sweeps import write_sweep

from moc_cli.cli import run

ONE = {"vary": {"method.rank": [2]}, "choose": None, "reference": None, "seeds": [0]}
Started = list[list[str]]
Capture = pytest.CaptureFixture[str]


def summary_of(call: list[str], capsys: Capture) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*call, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_finished_when_each_task_of_each_evaluation_is_scored(
    tmp_path: Path, choices: list[str], started: Started, capsys: Capture
) -> None:
    """The evaluation was stopped between two tasks, or its options are others now."""
    keys = ONE | {"results_dir": None, "set": {"train.max_steps": 1, "eval.before": False}}
    call = ["sweep", write_sweep(tmp_path, choices[1], **keys, eval=["--limit 4"])]
    whole = summary_of(call, capsys)
    (results,) = (tmp_path / "runs").glob("*/seed-0/eval/rank-limit-4/results.json")
    content = json.loads(results.read_text())
    results.write_text(json.dumps(content | {"tasks": {}}))
    started.clear()
    assert summary_of(call, capsys)["rows"] == whole["rows"]
    assert [command[0] for command in started] == ["train", "eval"]
    started.clear()
    call = ["sweep", write_sweep(tmp_path, choices[1], **keys, eval=["--limit 3", "--limit 4"])]
    (row,) = summary_of(call, capsys)["rows"]
    assert [command[0] for command in started] == ["train", "eval", "eval"]
    (cell,) = row["cells"].values()
    assert cell["scored"] == "rank-limit-3"  # the first one, whichever has more items


def test_a_candidate_that_fails_is_not_waited_for(
    tmp_path: Path, choices: list[str], started: Started, capsys: Capture
) -> None:
    """A rate so high that the training diverges leaves the choice among the others."""
    rates = {"vary": {"train.learning_rate": [0.01, 1e25]}, "choose": "train.learning_rate"}
    keys = rates | {"reference": None, "eval": [], "results_dir": None}
    steps = {"train.max_steps": 3, "eval.before": False, "eval.eval_strategy": "epoch"}
    assert run(["sweep", write_sweep(tmp_path, choices[1], **keys, set=steps), "--json"]) == 2
    summary = json.loads(capsys.readouterr().out)
    (cell,) = summary["rows"][0]["cells"].values()
    assert (cell["chosen"], cell["seeds"]) == ("0.01", [0, 1])
    (failed,) = summary["failed"]
    assert "1e+25" in failed


@pytest.mark.parametrize("key", ["vary", "--vary"])
def test_values_with_one_folder_are_refused(
    key: str, tmp_path: Path, choices: list[str], started: Started, capsys: Capture
) -> None:
    if key == "vary":
        vary = {"variant": {"moc": {}, "moc*": {"method.top_k": 3}}}
        call = [write_sweep(tmp_path, choices[1], **ONE | {"vary": vary})]
    else:
        call = [choices[1], "--vary", "method.top_k=1,1"]
    assert run(["sweep", *call]) == 2
    said = capsys.readouterr().err
    values = "variant: 'moc' and 'moc*'" if key == "vary" else "method.top_k: '1' and '1'"
    assert f"{values} would be trained in one folder" in said
    assert not started


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--limt 5"], "eval: --limt 5: No such option: --limt"),
        (["--tasks 'x"], "eval: --tasks 'x: No closing quotation"),
        (["--protocol x"], "--protocol: found 'x'"),
        (["--output-dir here"], "leave --output-dir out"),
        (["--limit 4", "--limit 4 --device cpu"], "would be written to eval/rank-limit-4"),
    ],
)
def test_options_of_evaluations_are_read_before_the_training(
    options: list[str],
    sentence: str,
    tmp_path: Path,
    choices: list[str],
    started: Started,
    capsys: Capture,
) -> None:
    sweep = write_sweep(tmp_path, choices[1], **ONE | {"eval": options})
    assert run(["sweep", sweep, "--dry-run"]) == 2
    assert sentence in capsys.readouterr().err
    assert run(["sweep", sweep, "--seeds", "0,99999999999"]) == 2
    assert "whole numbers from 0 to 4294967295" in capsys.readouterr().err
    assert not started


def test_files_that_a_sweep_has_not_written_are_kept(
    tmp_path: Path, choices: list[str], started: Started, capsys: Capture
) -> None:
    call = ["sweep", write_sweep(tmp_path, choices[1], **ONE | {"results_dir": None, "eval": []})]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sweep.json").write_text('{"mine": 1}')
    assert run(call) == 2
    assert "was not written by `moc sweep`" in capsys.readouterr().err
    assert not started


def test_a_sweep_of_a_recipe_has_a_folder_of_its_own(
    tmp_path: Path,
    choices: list[str],
    started: Started,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One for each set of keys that vary: the summary of the first is not replaced."""
    monkeypatch.chdir(tmp_path)
    steps = ["--set", "train.max_steps=1", "--set", "eval.before=false"]
    summary_of(["sweep", choices[1], "--vary", "method.rank=2", *steps], capsys)
    first = tmp_path / "runs/sweeps/recipe-rank/sweep.json"
    content = first.read_bytes()
    summary_of(["sweep", choices[1], "--vary", "method.alpha=0.9", *steps], capsys)
    assert (tmp_path / "runs/sweeps/recipe-alpha/sweep.json").is_file()
    assert first.read_bytes() == content
