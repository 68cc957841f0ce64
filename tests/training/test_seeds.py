"""`moc train --seeds`: the same runs as one by one, and what is said of them together."""

import json
import shlex
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.messages import refused

from moc_cli.adapter.folder import read_adapter
from moc_cli.cli import run
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe
from moc_cli.results import main_score
from moc_cli.runs import Call, RunFolder
from moc_cli.training import seeds as module
from moc_cli.training.interrupt import Interrupted
from moc_cli.training.seeds import plan, summarize_seeds, train_seeds


def short(choices: list[str]) -> list[str]:
    return [*choices, "--set", "train.max_steps=2", "--set", "output.save_steps=1"]


def write_results(home: Path, seed: int, tasks: dict[str, dict[str, Any]], average: float) -> None:
    folder = home / f"seed-{seed}"
    folder.mkdir(parents=True)
    known = {"stderr": None, "majority": None, "n": 8}
    whole = {
        task: known | entry | {"also": [known | part for part in entry.get("also", [])]}
        for task, entry in tasks.items()
    }
    results = {"status": "finished", "tasks": whole, "average": average, "seconds": 1.0}
    results |= {"protocol": "rank", "train_on_inputs": False, "steps": 2, "stopped": "finished"}
    results |= {"tokens": 100, "memory": {"kind": "peak resident", "peak": 1}}
    (folder / "results.json").write_text(json.dumps(results))


def finished(tmp_path: Path, values: list[float], before: float | None = 0.25) -> list[Recipe]:
    """Runs of one task with an accuracy and an F1 that falls as it rises."""
    recipe = load_recipe("quickstart", [f"output.output_dir={tmp_path}", "seed=0"])
    for seed, value in enumerate(values):
        f1 = {"metric": "f1", "value": 1 - value, "before": None}
        entry = {"metric": "accuracy", "value": value, "before": before, "also": [f1]}
        write_results(tmp_path, seed, {"mrpc": entry}, value)
    return plan(recipe, len(values))


def test_each_seed_is_the_run_that_it_would_be_alone(tmp_path, choices, capsys) -> None:
    assert run([*short(choices), "--seeds", "2", "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err.count("train 2/2") == 2
    assert found == json.loads((tmp_path / "run" / "seeds.json").read_text())
    assert [one["seed"] for one in found["seeds"]] == [42, 43]
    alone = tmp_path / "alone"
    assert run([*short(choices), "--set", "seed=43", "--output-dir", str(alone)]) == 0
    second = RunFolder.open(tmp_path / "run" / "seed-43")
    single = read_adapter(alone / "controls").payload()
    assert read_adapter(second.controls).payload() == single
    first = RunFolder.open(tmp_path / "run" / "seed-42")
    assert read_adapter(first.controls).payload() != single
    # The base is the same for both: it is scored in the first run alone.
    assert main_score(first.read_results()["tasks"]["ARC-Easy"])["before"] is not None
    assert main_score(second.read_results()["tasks"]["ARC-Easy"])["before"] is None
    assert (
        found["average"]["before"]
        == main_score(first.read_results()["tasks"]["ARC-Easy"])["before"]
    )


def test_a_recipe_that_scores_nothing_is_refused_before_a_seed_trains(tmp_path, capsys) -> None:
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    keys = [f"data.path={tmp_path / 'rows.txt'}", "data.held_out=0", "eval.eval_strategy=no"]
    sets = [word for key in keys for word in ("--set", key)]
    folder = tmp_path / "run"
    flags = ["--seeds", "2", "--output-dir", str(folder)]
    assert run(["train", "custom/world-llama/moc", *sets, *flags]) == 2
    assert "--seeds compares scores, and this recipe scores no rows" in capsys.readouterr().err
    assert not folder.exists()


def test_a_head_is_drawn_by_seed_and_scored_for_each(tmp_path, pairs, capsys) -> None:
    arguments = [*pairs, "--set", "train.max_steps=1", "--seeds", "2"]
    assert run(arguments) == 0
    shown = capsys.readouterr()
    for words in ("mean ± std", "(median)", "accuracy", "f1", "untrained"):
        assert words in shown.out
    entries = [
        RunFolder.open(tmp_path / "run" / f"seed-{seed}").read_results()["tasks"]["mrpc"]
        for seed in (42, 43)
    ]
    first, second = (main_score(entry)["before"] for entry in entries)
    assert first != second
    found = json.loads((tmp_path / "run" / "seeds.json").read_text())
    mean = pytest.approx((first + second) / 2)
    assert found["tasks"]["mrpc"]["accuracy"]["before"] == found["average"]["before"] == mean
    assert f"compare {tmp_path}/run/seed-42 {tmp_path}/run/seed-43" in shown.err


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([0.5], 0),
        ([0.7, 0.5], 1),
        ([0.9, 0.1, 0.5], 2),
        ([0.4, 0.3, 0.2, 0.1], 2),
        ([0.80, 0.83, 0.81, 0.79, 0.90], 2),
        ([0.5, 0.5, 0.5], 1),
    ],
)
def test_the_median_is_a_run_that_there_is(tmp_path, values: list[float], median: int) -> None:
    found = summarize_seeds(finished(tmp_path, values))
    assert found["median"]["seed"] == median
    assert found["median"]["path"] == str(tmp_path / f"seed-{median}")
    assert found["median"]["value"] == values[median] == sorted(values)[(len(values) - 1) // 2]
    assert found["median"]["by"] == "accuracy"


def test_mean_and_spread_are_of_a_sample(tmp_path) -> None:
    values = [0.80, 0.83, 0.81, 0.79, 0.90]
    found = summarize_seeds(finished(tmp_path, values))["tasks"]["mrpc"]
    assert found["accuracy"]["mean"] == pytest.approx(4.13 / 5)
    squares = sum((value - 4.13 / 5) ** 2 for value in values)
    assert found["accuracy"]["std"] == pytest.approx((squares / 4) ** 0.5)
    assert found["accuracy"]["before"] == 0.25
    assert found["f1"]["mean"] == pytest.approx(1 - 4.13 / 5)
    assert found["f1"]["median"] == statistics.median(1 - value for value in values)
    assert found["f1"]["before"] is None


def test_one_seed_has_no_spread_and_an_unscored_base_no_value(tmp_path) -> None:
    found = summarize_seeds(finished(tmp_path, [0.5], before=None))
    assert found["average"] == {"mean": 0.5, "std": None, "median": 0.5, "before": None}


def test_several_tasks_have_their_median_by_the_average(tmp_path) -> None:
    recipe = load_recipe("quickstart", [f"output.output_dir={tmp_path}", "seed=0"])
    for seed, (a, b) in enumerate([(0.9, 0.2), (0.1, 0.8), (0.4, 0.6)]):
        tasks = {
            "boolq": {"metric": "accuracy", "value": a, "before": 0.5},
            "piqa": {"metric": "accuracy", "value": b, "before": 0.3},
        }
        write_results(tmp_path, seed, tasks, (a + b) / 2)
    found = summarize_seeds(plan(recipe, 3))
    assert (found["median"]["seed"], found["median"]["by"]) == (2, "average")
    assert found["average"]["before"] == pytest.approx(0.4)


def test_of_perplexities_the_worse_are_the_higher(tmp_path) -> None:
    recipe = load_recipe("quickstart", [f"output.output_dir={tmp_path}", "seed=0"])
    for seed, value in enumerate([12.0, 10.0]):
        entry = {"metric": "perplexity", "value": value, "before": None}
        write_results(tmp_path, seed, {"notes": entry}, value)
    # Of two, the worse one: with accuracies the lower, here the higher.
    assert summarize_seeds(plan(recipe, 2))["median"]["seed"] == 0


def test_a_stop_keeps_what_is_done_and_auto_goes_on(tmp_path, choices, capsys, monkeypatch) -> None:
    arguments = [*short(choices), "--seeds", "3"]
    usual = module.Session.run

    def stopped(self, **how):
        if self.recipe.seed == 43:
            raise KeyboardInterrupt
        return usual(self, **how)

    monkeypatch.setattr(module.Session, "run", stopped)
    assert run(arguments) == 130
    said = capsys.readouterr().err
    assert f"moc {shlex.join(arguments)} --resume auto" in said
    summary = json.loads((tmp_path / "run" / "seeds.json").read_text())
    assert (summary["status"], len(summary["seeds"])) == ("running", 1)
    kept = (tmp_path / "run" / "seed-42" / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(module.Session, "run", usual)
    assert run(arguments) == 2
    assert "not empty" in capsys.readouterr().err
    assert run([*arguments, "--resume", "auto"]) == 0
    said = capsys.readouterr().err
    assert "seed 42: finished before" in said
    assert (tmp_path / "run" / "seed-42" / "results.json").stat().st_mtime_ns == kept
    summary = json.loads((tmp_path / "run" / "seeds.json").read_text())
    assert (summary["status"], len(summary["seeds"])) == ("finished", 3)


def test_a_signal_inside_a_run_says_how_all_seeds_go_on(tmp_path, choices, monkeypatch) -> None:
    recipe = load_recipe(choices[1], ["train.max_steps=4", "output.save_steps=1"])

    def stopped(self, *parts):
        self.interrupt.signal = 15
        return fit(self, *parts)

    fit = module.Session.fit
    monkeypatch.setattr(module.Session, "fit", stopped)
    options = module.TrainOptions(Call("moc train mine.yaml --seeds 2"))
    with refused(Interrupted) as stop:
        train_seeds(recipe, 2, options, lambda text: None)
    assert stop.value.exit_code == 143
    monkeypatch.setattr(module.Session, "fit", fit)
    found = train_seeds(recipe, 2, replace(options, resume="auto"), lambda text: None)
    history = RunFolder.open(tmp_path / "run" / "seed-42").read_environment()["history"]
    assert len(history) == 2
    assert len(found["seeds"]) == 2


def test_a_changed_recipe_is_refused_before_any_seed_trains(tmp_path, choices, capsys) -> None:
    arguments = [*short(choices), "--seeds", "1"]
    assert run(arguments) == 0
    capsys.readouterr()
    changed = [*short(choices), "--seeds", "2", "--set", "method.rank=2", "--resume", "auto"]
    assert run(changed) == 2
    assert "method.rank (4 then, 2 now)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "seed-43").exists()


def test_more_steps_continue_finished_seeds_and_overwrite_replaces_them(tmp_path, choices) -> None:
    arguments = [*short(choices), "--seeds", "1"]
    assert run(arguments) == 0
    longer = [*arguments, "--set", "train.max_steps=3"]
    assert run([*longer, "--resume", "auto"]) == 0
    folder = RunFolder.open(tmp_path / "run" / "seed-42")
    assert folder.read_results()["steps"] == 3
    assert len(folder.read_environment()["history"]) == 2
    assert run([*arguments, "--overwrite"]) == 0
    assert folder.read_results()["steps"] == 2
    assert len(folder.read_environment()["history"]) == 1


def test_what_does_not_go_together(tmp_path, choices, capsys) -> None:
    assert run([*short(choices), "--seeds", "2", "--resume", str(tmp_path)]) == 2
    assert "--seeds trains several" in capsys.readouterr().err
    assert run([*choices, "--seeds", "0"]) == 2
    assert run([*short(choices), "--seeds", "2", "--set", f"seed={2**32 - 1}"]) == 2
    assert "beyond the last one" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    assert run([*short(choices), "--seeds", "2", "--overwrite"]) == 2
    assert "holds a single run" in capsys.readouterr().err
