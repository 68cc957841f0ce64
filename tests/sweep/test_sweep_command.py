"""`moc sweep`: which runs are trained, what a second call finds, and what is said of the scores."""

import gzip
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest
from support.sweeps import Ended, write_sweep

from moc_cli.cli import run
from moc_cli.files import lock_file
from moc_cli.report.sweep_tables import average_name, averaged, line_name, sweep_tables
from moc_cli.sweep import execute
from moc_cli.sweep.summary import average_of_rows

WITHOUT_TORCH = """
import sys
sys.modules |= {"torch": None, "transformers": None}
from moc_cli.cli import run
sys.exit(run(sys.argv[1:]))
"""


def test_it_searches_trains_the_other_seeds_and_compares(
    tmp_path: Path, choices: list[str], started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep(tmp_path, choices[1])
    assert run(["sweep", sweep, "--dry-run", "--json"]) == 0
    listed = [one["name"] for one in json.loads(capsys.readouterr().out)["runs"]]
    assert listed == [
        *(f"{r}/learning_rate-{lr}/seed-0" for r in ("r2", "r4") for lr in (0.001, 0.01)),
        *(f"{r}/*/seed-1" for r in ("r2", "r4")),
    ]
    assert run(["sweep", sweep, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    trained = [call for call in started if call[0] == "train"]
    assert len(trained) == summary["needed"] == summary["finished"] == 6
    assert [call[0] for call in started] == ["train", "eval"] * 6
    (row,) = summary["rows"]
    for size, cell in row["cells"].items():
        assert cell["seeds"] == [0, 1]
        tried = [r for r in summary["runs"] if r["settings"]["size"] == size and r["seed"] == 0]
        best = min(tried, key=lambda one: _rank(one["validation"]))
        assert cell["chosen"] == best["candidate"]
        later = [r for r in summary["runs"] if r["settings"]["size"] == size and r["seed"] == 1]
        assert [r["candidate"] for r in later] == [cell["chosen"]]
    difference = row["differences"]["r4"]["ARC-Easy"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert (difference["items"], difference["seeds"]) == (6, [2, 2])
    kept = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert {path.name for path in kept} == {
        *("recipe.yaml", "results.json", "environment.json", "samples.jsonl.gz", "metrics.jsonl"),
        *("sweep.json", "sweep.png", "sweep.svg"),
    }
    for path in (tmp_path / "kept").rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines if line["eval"]] == [1]
    home = str(tmp_path / "runs").encode()
    assert not any(home in path.read_bytes() for path in kept)
    # The kept files are enough: nothing is trained again, and the numbers are the same.
    started.clear()
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert run(["sweep", sweep, "--json"]) == 0
    assert not started
    assert json.loads(capsys.readouterr().out) == summary
    answer = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "sweep", sweep, "--json"],
        capture_output=True,
        check=True,
    )
    assert json.loads(answer.stdout) == summary
    # The scores are those of the sweep's evaluation, though another one has more items.
    assert {cell["scored"] for cell in row["cells"].values()} == {"rank"}
    one = next((tmp_path / "kept").glob("r4/*/seed-1/eval/*"))
    other = shutil.copytree(one, one.with_name("other"))
    content = json.loads((other / "results.json").read_text())
    for score in content["tasks"]["ARC-Easy"]["metrics"].values():
        score |= {"n": 1000, "value": 0.123}
    (other / "results.json").write_text(json.dumps(content))
    assert run(["sweep", sweep, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == summary["rows"]
    shutil.rmtree(other)
    # Each side's interval is made from its own items: here r4 is right everywhere, r2 nowhere.
    for folder in (tmp_path / "kept").glob("r[24]/*/*/eval/*"):
        answer_all(folder, right="r4" in folder.parts)
    assert run(["sweep", sweep, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    difference = row["differences"]["r4"]["ARC-Easy"]
    assert (difference["low"], difference["mean"], difference["high"]) == (1.0, 1.0, 1.0)
    assert row["cells"]["r2"]["tasks"]["ARC-Easy"]["values"] == [0.0, 0.0]
    # The same runs beside another of them.
    assert run(["sweep", sweep, "--reference", "r4", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert list(row["differences"]) == ["r2"]
    assert row["differences"]["r2"]["ARC-Easy"]["mean"] == -1.0
    assert not started
    assert run(["sweep", sweep]) == 0
    assert "an interval needs" not in capsys.readouterr().out
    # Without the items of one run there is no interval, and a line says what it needs.
    next((tmp_path / "kept").glob("r4/*/seed-1/eval/*/samples.jsonl.gz")).unlink()
    assert run(["sweep", sweep]) == 0
    assert "an interval needs the items" in capsys.readouterr().out


def answer_all(folder: Path, *, right: bool) -> None:
    """Let every answer of a kept evaluation be right, or wrong."""
    samples, results = folder / "samples.jsonl.gz", folder / "results.json"
    items = [json.loads(line) for line in gzip.decompress(samples.read_bytes()).splitlines()]
    lines = [json.dumps(item | {"correct": right}) + "\n" for item in items]
    samples.write_bytes(gzip.compress("".join(lines).encode()))
    content = json.loads(results.read_text())
    for entry in content["tasks"].values():
        entry["metrics"][entry["metric"]]["value"] = float(right)
    content["samples_sha256"] = hashlib.sha256("".join(lines).encode()).hexdigest()
    results.write_text(json.dumps(content))


def test_an_average_is_of_several_scores_and_says_of_which() -> None:
    values = {"r2": {"tasks": 2, "median": 0.5}}
    summary = {"rows": [{"name": "a"}, {"name": "b"}], "average": {"rows": ["a"], "values": values}}
    assert averaged(summary) == values
    assert average_name(summary) == "average of a"
    summary["average"] = {"rows": ["a", "b"], "values": {"r2": {"tasks": 1}}}
    assert averaged(summary) == {}
    assert average_name(summary) == "average"
    assert averaged({"rows": [], "average": {}}) == {}
    assert line_name("", "boolq", "accuracy") == "boolq accuracy"
    assert line_name("rte 0.001", "rte", "accuracy") == "rte 0.001 accuracy"
    assert line_name("1 1", "world", "accuracy") == "1 1 world accuracy"


def test_an_average_is_of_one_scale_and_of_tasks_that_all_have() -> None:
    def cell(**medians: float) -> dict[str, Any]:
        scores = {
            task: {"metric": "perplexity" if task == "news" else "accuracy", "median": median}
            for task, median in medians.items()
        }
        return {"tasks": scores}

    row = {"name": "a", "differences": {}}
    mixed = [row | {"cells": {"r2": cell(news=5.0, boolq=0.5), "r4": cell(news=4.0, boolq=0.6)}}]
    assert average_of_rows(mixed, None) == {}
    whole, part = cell(boolq=0.5, piqa=0.7), cell(boolq=0.6)
    average = average_of_rows([row | {"cells": {"r2": whole, "r4": part}}], None)
    assert {name: entry["median"] for name, entry in average["values"].items()} == {
        "r2": 0.5,
        "r4": 0.6,
    }
    texts = [row | {"cells": {"r2": cell(news=5.0), "r4": cell(news=4.0)}}]
    average = average_of_rows([*texts, texts[0] | {"name": "b"}], None)
    assert (average["metric"], average["values"]["r2"]["median"]) == ("perplexity", 5.0)
    conditions = {"device": ["cpu"]}
    for text in texts:
        for cell_of in text["cells"].values():
            cell_of |= {"scored": "texts", "seeds": [0], "trained": 1, "seconds": 1, "chosen": None}
            cell_of["tasks"]["news"]["values"] = [cell_of["tasks"]["news"]["median"]]
    for text in texts:
        text["search"] = {}
    shown = {"rows": [*texts, texts[0] | {"name": "b"}], "average": average, "compared": "size"}
    shown |= {"candidates": [], "choose_seeds": []}
    head, *_ = sweep_tables(
        shown | {"conditions": conditions, "chosen": None, "reference": None, "confidence": 0.95}
    )
    assert head.title == "Scores of eval/texts: median over seeds (lowest to highest)"
    assert [str(cell) for cell in head.rows[-1]] == ["average", "5.00", "4.00"]


def _rank(validation: dict[str, Any]) -> float:
    lower = validation["metric"] == "loss"
    return validation["value"] if lower else -validation["value"]


def test_the_same_command_goes_on_with_its_changes(
    tmp_path: Path, choices: list[str], started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Where no small files are kept apart, a run's own recipe holds what `--set` has changed."""
    keys = {"vary": {"method.rank": [2, 4]}, "choose": None, "reference": None, "seeds": [0]}
    call = ["sweep", write_sweep(tmp_path, choices[1], **keys, eval=[], results_dir=None)]
    changed = [*call, "--set", "eval.max_samples=3", "--set", "train.weight_decay=0.5", "--json"]
    assert run(changed) == 0
    assert len(started) == 2
    summary = json.loads(capsys.readouterr().out)
    assert run(changed) == 0
    assert len(started) == 2
    assert json.loads(capsys.readouterr().out) == summary
    assert run([*call, "--set", "train.weight_decay=0.5", "--json"]) == 2
    assert "eval.max_samples (3 then" in capsys.readouterr().out


def test_kept_results_are_those_of_the_sweep_as_its_file_has_it(
    tmp_path: Path, choices: list[str], started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """What `--set` changes beside places, and runs in a folder of one's own, are not kept there."""
    keys = {"vary": {"method.rank": [2]}, "choose": None, "reference": None, "seeds": [0]}
    call = ["sweep", write_sweep(tmp_path, choices[1], **keys, eval=[])]
    elsewhere = shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    places = ["--set", f"data.path={elsewhere}", "--set", "launch.num_threads=2"]
    assert run([*call, *places]) == 0
    assert "is left alone" not in capsys.readouterr().err
    kept = {path: path.read_bytes() for path in (tmp_path / "kept").rglob("*") if path.is_file()}
    shutil.rmtree(tmp_path / "kept")  # the run folders are enough too: nothing is trained again
    started.clear()
    assert run([*call, *places]) == 0
    assert not started
    assert kept == {path: path.read_bytes() for path in kept}
    assert not any(str(elsewhere).encode() in content for content in kept.values())
    changed = [*call, "--set", "train.weight_decay=0.5"]
    assert run(changed) == 2
    assert "train.weight_decay (0.01 then, 0.5 now)" in capsys.readouterr().err
    for command in (changed, call):
        started.clear()
        assert run([*command, "--output-dir", str(tmp_path / "own")]) == 0
        assert len(started) == 1
        said = capsys.readouterr().err
        assert f"results stay in {tmp_path / 'own'}: {tmp_path / 'kept'} is for the sweep" in said
        shutil.rmtree(tmp_path / "own")
    assert kept == {path: path.read_bytes() for path in kept}


def test_a_run_that_fails_does_not_stop_the_others(
    tmp_path: Path,
    choices: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here all fail: each is told with the last word of its log, and the whole ends with 2."""

    def start(command: list[str], environment: dict[str, str], log: IO[str]) -> Ended:
        log.write("device cpu\nError: no rows\nHint: give some\n")
        return Ended(2)

    monkeypatch.setattr(execute, "start", start)
    monkeypatch.setattr(execute, "POLL", 0.0)
    call = ["sweep", write_sweep(tmp_path, choices[1]), "--reference", "r4"]
    assert run([*call, "--json"]) == 2
    said = capsys.readouterr()
    failed = json.loads(said.out)["failed"]
    assert len(failed) == 4
    assert all(reason.startswith("no rows (see ") for reason in failed.values())
    assert f"4 runs failed; after fixing the cause: {shlex.join(['moc', *call])}" in said.err


def test_two_sweeps_share_the_runs(
    tmp_path: Path,
    choices: list[str],
    started: list[list[str]],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another process trains one run: the others are trained meanwhile, and that one awaited."""
    keys = {"vary": {"method.rank": [2, 4]}, "choose": None, "reference": None, "seeds": [0]}
    call = ["sweep", write_sweep(tmp_path, choices[1], **keys, eval=[])]
    logs = tmp_path / "runs" / "logs"
    logs.mkdir(parents=True)
    other = lock_file(logs / "rank-2--seed-0.log", os.O_RDWR | os.O_CREAT)
    assert other is not None
    waits = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(started) == 1 and len(waits) == 5:  # the other sweep ends, its run finished
            os.close(other)
            assert run(call) == 0

    # Not time.sleep itself: other threads of a training sleep too.
    monkeypatch.setattr(execute, "time", SimpleNamespace(sleep=wait, monotonic=time.monotonic))
    monkeypatch.setattr(execute, "LOOK_AGAIN", 0.0)
    assert run([*call, "--json"]) == 0
    ranks = [next(key for key in command if "method.rank" in key) for command in started]
    assert ranks == ["method.rank=4", "method.rank=2"]
    assert capsys.readouterr().err.count("rank-2/seed-0: another process trains it") == 1


def test_mistakes_of_all_recipes_are_told_before_anything_is_trained(
    tmp_path: Path, choices: list[str], started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    vary = {"size": {"a": {"method.ranks": 2}, "b": {"method.rank": 0}, "c": {"seeed": 1}}}
    keys = {"vary": vary, "choose": "size", "reference": None}
    assert run(["sweep", write_sweep(tmp_path, choices[1], **keys)]) == 2
    said = capsys.readouterr().err
    for part in ("did you mean 'rank'", "(first in b)", "'seed'"):
        assert part in said
    assert not started
    assert not (tmp_path / "runs").exists()


def test_keys_that_a_sweep_gives_itself_are_refused(
    choices: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["sweep", choices[1], "--vary", "seed=1,2", "--set", "output.output_dir=x"]) == 2
    said = capsys.readouterr().err
    assert "--seeds N,M" in said
    assert "--output-dir DIR for all" in said


def test_a_reference_is_one_of_the_values(
    choices: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = ["sweep", choices[1], "--vary", "method.rank=12,16", "--dry-run", "--reference"]
    assert run([*ranks, "12"]) == 0
    capsys.readouterr()
    sweep = write_sweep(Path(choices[1]).parent, choices[1], reference="0.01")
    assert run(["sweep", sweep]) == 2  # a value that is chosen from
    assert "reference: not one of the compared values; allowed: r2, r4" in capsys.readouterr().err
    vary = {"train.learning_rate": [0.001, 0.01]}
    sweep = write_sweep(Path(choices[1]).parent, choices[1], vary=vary, reference="0.01")
    assert run(["sweep", sweep]) == 2
    assert "reference: nothing is compared" in capsys.readouterr().err
    assert run([*ranks, "13"]) == 2
    said = capsys.readouterr().err
    assert "--reference 13: not one of the compared values" in said
    assert "allowed: 12, 16" in said


def test_a_recipe_needs_what_varies(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", "quickstart"]) == 2
    assert "quickstart is a recipe: say what varies" in capsys.readouterr().err


def test_a_folder_of_another_recipe_is_not_touched(
    tmp_path: Path, choices: list[str], started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A search over one key alone; then the recipe becomes another one."""
    keys = {"vary": {"train.learning_rate": [0.01]}, "seeds": [0], "eval": [], "reference": None}
    assert run(["sweep", write_sweep(tmp_path, choices[1], **keys), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["cells"]["grid"]["chosen"] == "0.01"
    started.clear()
    other = {"set": {"train.max_steps": 1, "method.top_k": 3, "eval.eval_strategy": "epoch"}}
    assert run(["sweep", write_sweep(tmp_path, choices[1], **keys | other)]) == 2
    assert "method.top_k (1 then, 3 now)" in capsys.readouterr().err
    assert not started
