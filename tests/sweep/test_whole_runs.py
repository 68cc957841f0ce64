"""When a run of a sweep counts, which of its scores do, and what is refused before any training."""

import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import IO, Any

import pytest
from support.sweeps import Ended, write_sweep

from moc_cli.cli import run
from moc_cli.sweep import execute

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
    assert [command[0] for command in started] == ["eval"]  # what is trained stays as it is
    started.clear()
    call = ["sweep", write_sweep(tmp_path, choices[1], **keys, eval=["--limit 3", "--limit 4"])]
    (row,) = summary_of(call, capsys)["rows"]
    assert [command[2:] for command in started] == [["--limit", "3"]]
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


def test_values_are_tried_on_several_seeds(
    tmp_path: Path, choices: list[str], started: Started, capsys: Capture
) -> None:
    """The mean over the seeds of the search chooses, where the first seed alone says otherwise."""
    sweep = write_sweep(tmp_path, choices[1], seeds=[0, 1, 2], eval=[], choose_seeds=2)
    call = ["sweep", sweep]
    assert run([*call, "--dry-run", "--json"]) == 0
    listed = [one["name"] for one in json.loads(capsys.readouterr().out)["runs"]]
    assert listed == [
        *(
            f"{size}/learning_rate-{rate}/seed-{seed}"
            for seed in (0, 1)
            for size in ("r2", "r4")
            for rate in (0.001, 0.01)
        ),
        *("r2/*/seed-2", "r4/*/seed-2"),
    ]
    summary = summary_of(call, capsys)
    assert len(started) == summary["needed"] == summary["finished"] == 2 * (2 * 2 + 1)
    assert summary["choose_seeds"] == [0, 1]
    losses = {"0.001": [1.0, 4.0], "0.01": [2.0, 2.0]}
    for rate, values in losses.items():
        for seed, value in enumerate(values):
            validate(tmp_path / "kept" / "r2" / f"learning_rate-{rate}" / f"seed-{seed}", value)
    started.clear()
    (row,) = summary_of(call, capsys)["rows"]
    assert row["cells"]["r2"]["chosen"] == "0.01"
    for rate, values in losses.items():
        found = {"metric": "loss", "seeds": [0, 1], "values": values, "mean": sum(values) / 2}
        assert row["search"]["r2"][rate] == found
    (row,) = summary_of([*call, "--choose-seeds", "1"], capsys)["rows"]
    assert row["cells"]["r2"]["chosen"] == "0.001"
    assert row["search"]["r2"]["0.001"]["values"] == [1.0]
    assert run(call) == 0
    title, head, _, line, *_ = [
        text for text in capsys.readouterr().out.splitlines() if text.strip()
    ]
    assert title.strip() == "Search: best score on the validation rows, mean over seeds 0, 1"
    assert head.split() == ["size", "0.001", "0.01"]
    assert "r2" in line


def validate(folder: Path, value: float) -> None:
    """Let a run's best value on its validation rows be a loss of this size."""
    results = folder / "results.json"
    content = json.loads(results.read_text())
    content["validation"] = {"metric": "loss", "value": value, "step": 1}
    results.write_text(json.dumps(content))


def test_a_candidate_that_fails_on_one_seed_is_left_out(
    tmp_path: Path, choices: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though it is the better one on the other seed."""

    def start(command: list[str], environment: dict[str, str], log: IO[str]) -> Ended:
        if "train.learning_rate=0.01" in command and "seed=1" in command:
            log.write("Error: the loss is not finite\n")
            return Ended(2)
        with redirect_stdout(log):
            return Ended(run(command[3:]))

    monkeypatch.setattr(execute, "start", start)
    monkeypatch.setattr(execute, "POLL", 0.0)
    vary = {"train.learning_rate": [0.001, 0.01]}
    keys = {"vary": vary, "reference": None, "eval": [], "choose_seeds": 2, "results_dir": None}
    assert run(["sweep", write_sweep(tmp_path, choices[1], **keys), "--json"]) == 2
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    (cell,) = row["cells"].values()
    assert (cell["chosen"], cell["seeds"]) == ("0.001", [0, 1])


def test_the_choice_is_made_among_the_same_runs(
    tmp_path: Path, choices: list[str], started: Started, capsys: Capture
) -> None:
    """A run's folder does not depend on what is chosen: a whole grid can be looked at both ways."""
    vary = {"train.learning_rate": [0.001, 0.01], "method.rank": [2, 4]}
    without = {"train.max_steps": 1, "eval.before": False, "eval.eval_strategy": "no"}
    unwatched = write_sweep(tmp_path, choices[1], vary=vary, reference=None, set=without)
    watch = ["--set", "eval.eval_strategy=epoch"]
    assert run(["sweep", unwatched, "--dry-run"]) == 2
    assert "and eval.eval_strategy is no" in capsys.readouterr().err
    assert run(["sweep", unwatched, "--dry-run", *watch]) == 0
    capsys.readouterr()
    keys = {"vary": vary, "choose": None, "reference": None, "eval": [], "results_dir": None}
    call = ["sweep", write_sweep(tmp_path, choices[1], **keys)]
    assert len(summary_of(call, capsys)["rows"]) == 2
    assert len(started) == 8
    started.clear()
    choose = [*call, "--choose", "train.learning_rate", "--choose-seeds"]
    (row,) = summary_of([*choose, "2"], capsys)["rows"]
    assert not started
    assert [cell["seeds"] for cell in row["cells"].values()] == [[0, 1], [0, 1]]
    assert run([*choose, "3"]) == 2
    said = capsys.readouterr().err
    assert "--choose-seeds: found 3; allowed: a whole number from 1 to 2" in said
    assert run([*call, "--choose", "train.learning_rates", "--choose-seeds", "1"]) == 2
    assert "did you mean 'train.learning_rate'" in capsys.readouterr().err
    assert run([*call, "--choose-seeds", "1"]) == 2
    assert "--choose-seeds: nothing is chosen" in capsys.readouterr().err


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
