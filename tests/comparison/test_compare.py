"""`moc compare` on run folders made by hand: what is paired, shown, said and refused."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from support.messages import refused

from moc_cli.adapter.folder import write_adapter
from moc_cli.cli import run
from moc_cli.comparison.compare import compare_runs, method_name
from moc_cli.comparison.curves import draw_curves, smooth
from moc_cli.comparison.pairs import BY_ITEM, pair
from moc_cli.comparison.runs import Run, read_runs
from moc_cli.errors import RunError
from moc_cli.recipe.load import dump, load_recipe
from moc_cli.report.comparison_tables import comparison_tables
from moc_cli.scoring.metrics import METRICS

Make = Callable[..., Path]
OTHER_SETTINGS = {
    **{"learning_rate": 0.5, "lr_scheduler_type": "constant", "weight_decay": 0.5},
    **{"warmup_steps": 7, "warmup_ratio": 0.5, "max_grad_norm": 0.5},
    **{"adam_beta1": 0.5, "adam_beta2": 0.5, "adam_epsilon": 0.5},
}
SHARE = {"adapter": 200, "modules": 0, "base": 10_000, "share": 0.02}
RIGHT = {"a": [1, 1, 1, 0, 0, 1, 0, 1], "b": [1, 0, 1, 1, 1, 1, 0, 1]}  # of the items of a task


def metric_entry(metric: str, value: float, n: int) -> dict[str, Any]:
    score = {"value": value, "n": n, "stderr": 0.1, "majority": 0.5}
    return {"metric": metric, "metrics": {metric: score}}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(name, *overrides, recipe=, results=, status=, ...)` writes a run folder."""

    def write(
        name: str,
        *overrides: str,
        recipe: str = "quickstart",
        tasks: dict[str, Any] | None = None,
        status: str = "finished",
        **changes: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        loaded = load_recipe(recipe, [f"output.output_dir={folder}", *overrides])
        (folder / "recipe.yaml").write_text(dump(loaded))
        results = {
            "format": 2,
            "status": status,
            "tasks": tasks or {"world": metric_entry("accuracy", 0.5, 8)},
            "protocol": "rank",
            "train_on_inputs": loaded.data.train_on_inputs,
            "stopped": "finished",
            "steps": 30,
            "tokens": 6000,
            "seconds": 60.0,
            "parameters": {"adapter": 100, "modules": 0, "base": 10_000, "share": 0.01},
            "memory": {"peak": 2_000_000, "kind": changes.get("kind", "peak resident")},
            "routing": {
                "pools": {
                    "shared": {
                        "controls": ["0.attn", "0.ffn"],
                        "use": [1.0, 0.0],
                        "decisions": 8,
                        "dead": ["0.ffn"],
                        "local_share": 0.125,
                    }
                }
            }
            if loaded.method.name == "moc"
            else {},
        }
        results |= changes.get("results", {})
        if status is not None:
            (folder / "results.json").write_text(json.dumps(results))
        environment = {
            "versions": {"torch": "2"},
            "device": {"kind": "cpu", "name": "X", "threads": changes.get("threads", 1)},
            "model": {"name": "base", "weights_sha256": changes.get("weights", "0" * 64)},
            "data": {
                "train": {"rows": 9, "sha256": changes.get("train", "1" * 64)},
                **{f"test {task}": {"rows": 8, "sha256": "2" * 64} for task in results["tasks"]},
            },
        }
        (folder / "environment.json").write_text(json.dumps(environment))
        lines = [{"step": step, "epoch": step / 10, "loss": 3 / step} for step in range(1, 31)]
        lines.append({"step": 30, "epoch": 3.0, "eval": {"loss": 0.2}})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        if status == "finished":
            write_adapter(folder / "controls", {"format": 1}, b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
        return folder

    return write


def choice_items(right: list[int]) -> list[dict[str, Any]]:
    return [
        {"row": row, "prompt": f"p{row}", "label": 1, "prediction": good, "correct": bool(good)}
        for row, good in enumerate(right)
    ]


def write_eval(
    folder: Path,
    items: dict[str, list[dict[str, Any]]],
    metrics: dict[str, list[str]] | None = None,
    label: str = "rank",
    **conditions: Any,
) -> None:
    """Write what `moc eval` leaves, the metrics computed from the items."""
    tasks = {}
    for task, lines in items.items():
        found = []
        for metric in (metrics or {}).get(task, ["accuracy"]):
            if metric in BY_ITEM:
                value = float(np.mean([item["correct"] for item in lines]))
            elif metric == "perplexity":
                sums = [sum(item[key] for item in lines) for key in ("loss", "tokens")]
                value = float(np.exp(sums[0] / sums[1]))
            else:
                sides = ([item[key] for item in lines] for key in ("label", "prediction"))
                value = METRICS[metric](*sides)
            found.append(metric_entry(metric, value, len(lines)))
        scores = {metric: score for entry in found for metric, score in entry["metrics"].items()}
        tasks[task] = found[0] | {"metrics": scores, "rows": len(lines), "limited": False}
    text = "".join(
        json.dumps({"task": task} | item) + "\n" for task, lines in items.items() for item in lines
    )
    path = folder / "eval" / label
    path.mkdir(parents=True, exist_ok=True)
    (path / "samples.jsonl").write_text(text)
    controls = json.loads((folder / "controls" / "adapter_config.json").read_text())
    known = {
        "format": 2,
        "protocol": "rank",
        "limit": None,
        "controls_sha256": controls["payload_sha256"],
        **conditions,
        "tasks": tasks,
        "samples_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    (path / "results.json").write_text(json.dumps(known))


def shown(runs: list[Run], width: int = 80, **how: Any) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for table in comparison_tables(compare_runs(runs, **how).to_json(), width=width):
        console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    return text


def test_items_are_paired_and_the_difference_has_an_interval(make: Make) -> None:
    first, second = make("a"), make("b", "method=control")
    write_eval(first, {"world": choice_items(RIGHT["a"])})
    write_eval(second, {"world": choice_items(RIGHT["b"])[::-1]})  # in another order
    found = compare_runs(read_runs([first, second]))
    (one,) = found.differences
    assert (found.label, found.commands) == ("rank", [])
    assert (one.run, one.task, one.metric, one.items) == ("b", "world", "accuracy", 8)
    assert one.value == pytest.approx(1 / 8)
    assert one.low is not None
    assert one.high is not None
    assert one.low < one.value < one.high
    # Items 3 and 4 only b has right, item 1 only a.
    assert (one.only_first, one.only_this) == (1, 2)
    text = shown(read_runs([first, second]))
    for words in ("moc r16 K1 α0.95", "control r64", "62.5 ± 10.0", "1 of 2", "12.5", "+12.5"):
        assert words in text


def test_a_run_differs_from_its_copy_by_exactly_nothing(make: Make) -> None:
    first, second = make("a"), make("b")
    for folder in (first, second):
        write_eval(folder, {"world": choice_items(RIGHT["a"])})
    found = compare_runs(read_runs([first, second]))
    assert [(one.value, one.low, one.high) for one in found.differences] == [(0, 0, 0)]
    assert found.notes == []


def test_metrics_of_classes_and_values_are_recomputed(make: Make) -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 90)
    scores = rng.normal(size=90)
    folders = [make("a"), make("b")]
    for number, folder in enumerate(folders):
        guesses = np.where(rng.random(90) < 0.7 + 0.1 * number, labels, 1 - labels)
        near = scores + rng.normal(0, 1 - 0.5 * number, size=90)
        write_eval(
            folder,
            {
                "mrpc": [
                    {
                        "row": i,
                        "prompt": str(i),
                        "label": int(label),
                        "prediction": int(guess),
                        "correct": bool(label == guess),
                    }
                    for i, (label, guess) in enumerate(zip(labels, guesses, strict=True))
                ],
                "stsb": [
                    {"row": i, "prompt": str(i), "label": label, "prediction": guess}
                    for i, (label, guess) in enumerate(
                        zip(scores.tolist(), near.tolist(), strict=True)
                    )
                ],
            },
            {"mrpc": ["accuracy", "f1"], "stsb": ["pearson", "spearman"]},
            label="classify",
        )
    runs = read_runs(folders)
    found = {(one.task, one.metric): one for one in compare_runs(runs).differences}
    assert list(found) == [
        *[("mrpc", "accuracy"), ("mrpc", "f1"), ("stsb", "pearson"), ("stsb", "spearman")],
        ("average", ""),
    ]
    for (task, metric), one in found.items():
        assert one.low is not None
        assert one.high is not None
        assert one.low < one.value < one.high
        if task != "average":
            values = []
            for current in runs:
                entry = current.scores["classify"].tasks[task]
                values.append(entry["metrics"][metric]["value"])
            assert one.value == pytest.approx(values[1] - values[0])
    # The average is of the main metrics, and steadier than its parts.
    parts = [found["mrpc", "accuracy"], found["stsb", "pearson"]]
    average = found["average", ""]
    assert average.value == pytest.approx(sum(part.value for part in parts) / 2)
    widths = [part.high - part.low for part in parts]  # type: ignore[operator]
    expected = (widths[0] ** 2 + widths[1] ** 2) ** 0.5 / 2
    assert average.high - average.low == pytest.approx(expected, rel=0.1)  # type: ignore[operator]
    assert (found["stsb", "pearson"].only_first, average.items) == (None, 180)


def test_texts_are_paired_by_their_losses(make: Make) -> None:
    folders = [make("a"), make("b")]
    for folder, factor in zip(folders, (1.0, 0.9), strict=True):
        items = [
            {"row": row, "prompt": str(row), "loss": factor * 2.0 * (row + 1), "tokens": row + 1}
            for row in range(9)
        ]
        write_eval(folder, {"notes": items}, {"notes": ["perplexity"]}, label="texts")
    (one,) = compare_runs(read_runs(folders)).differences
    assert one.value == pytest.approx(np.exp(1.8) - np.exp(2.0))
    # Every text loses the same share, whichever are drawn.
    assert (one.low, one.high) == pytest.approx((one.value, one.value))
    assert "6.05" in shown(read_runs(folders))


def write_harness(folder: Path, right: list[int], word_perplexity: float) -> None:
    """Write what `moc eval --harness` leaves of a group, one of its tasks, and of a text."""
    write_eval(folder, {"part": choice_items(right)}, {"part": ["acc"]}, label="harness")
    path = folder / "eval" / "harness" / "results.json"
    known = json.loads(path.read_text())
    rest = {"rows": 8, "limited": False}
    known["tasks"]["group"] = metric_entry("acc", 0.5, 8) | rest
    known["tasks"]["part"]["part_of"] = "group"
    known["tasks"]["text"] = metric_entry("word_perplexity", word_perplexity, 8) | rest
    path.write_text(json.dumps(known))


def test_scores_of_the_harness_are_not_mixed(make: Make) -> None:
    """A perplexity is no fraction and has no mean with others; a group counts its parts already."""
    first, second = make("a"), make("b")
    write_harness(first, RIGHT["a"], 30.5)
    write_harness(second, RIGHT["b"], 32.5)
    runs = read_runs([first, second])
    found = compare_runs(runs, label="harness")
    assert {one.task: one.value for one in found.differences} == {
        "part": pytest.approx(1 / 8),
        "group": 0,
        "text": pytest.approx(2),
    }
    of_part, *others = found.differences
    assert of_part.low is not None
    assert (of_part.only_first, of_part.only_this) == (1, 2)
    assert [one.low for one in others] == [None, None]
    assert found.to_json()["averaged"] == []
    text = shown(runs, label="harness")
    assert "30.50" in text
    assert "+2.00" in text
    assert "average" not in text
    assert compare_runs(runs, label="harness", tasks=["part", "group"]).to_json()["averaged"] == [
        "group"
    ]


def test_what_does_not_pair_is_left_out_and_said(make: Make) -> None:
    first, second = make("a"), make("b")
    other = choice_items(RIGHT["b"])
    other[2]["prompt"] = "another"  # one item of each side is alone
    other[5]["label"] = 0
    write_eval(first, {"world": choice_items(RIGHT["a"]), "only": choice_items([1, 0])})
    write_eval(second, {"world": other})
    found = compare_runs(read_runs([first, second]))
    (one,) = found.differences
    assert one.items == 6
    assert one.value == pytest.approx((4 - 3) / 6)
    said = " ".join(found.notes)
    assert "2 items are in only one of a and b" in said
    assert "1 items have another label in a than in b" in said
    assert "b has no score of only" in said


def test_pairs_keep_rows_with_the_same_prompt_apart() -> None:
    items = [dict(item, prompt="same") for item in choice_items([1, 0, 1])]
    found = pair(items, items[::-1])
    assert [(a["row"], b["row"]) for a, b in zip(found.first, found.second, strict=True)] == [
        (2, 2), (1, 1), (0, 0)
    ]  # fmt: skip


def test_without_items_the_rest_is_shown_with_the_commands(make: Make, capsys) -> None:
    first, second = make("a"), make("b", "method=control")
    write_eval(first, {"world": choice_items([1, 0])}, label="rank-limit-2", limit=2)
    assert run(["compare", str(first), str(second), "--output-dir", str(first.parent / "out")]) == 0
    shown = capsys.readouterr()
    assert "at the end of training" in shown.out
    assert f"moc eval {second} --limit 2" in shown.err
    assert f"moc eval {first}" not in shown.err
    (one,) = compare_runs(read_runs([first, second])).differences
    assert (one.value, one.low, one.items) == (0, None, 0)


def test_the_evaluation_with_the_most_items_is_taken_or_the_one_asked_for(make: Make) -> None:
    folders = [make("a"), make("b")]
    for folder in folders:
        write_eval(folder, {"world": choice_items([1])}, label="rank-limit-1", limit=1)
        write_eval(folder, {"world": choice_items(RIGHT["a"])}, label="generate")
    runs = read_runs(folders)
    assert compare_runs(runs).label == "generate"
    assert compare_runs(runs, label="rank-limit-1").label == "rank-limit-1"
    assert compare_runs(runs, label="final").label == "final"
    with refused(RunError):
        compare_runs(runs, label="generat")


@pytest.mark.parametrize(
    ("overrides", "changes", "words"),
    [
        ([], {"weights": "f" * 64}, "do not start from the same weights"),
        ([], {"train": "f" * 64}, "have not learned from the same data"),
        (["data.train_on_inputs=true"], {}, "false in a; true in b"),
        (["train.per_device_train_batch_size=3"], {}, "Different rows a step: 16 in a; 3 in b"),
        (["train.gradient_accumulation_steps=2"], {}, "Different rows a step: 16 in a; 32 in b"),
        *(
            ([f"train.{key}={value}"], {}, f"Different train.{key}: ")
            for key, value in OTHER_SETTINGS.items()
        ),
        (["data.max_length=99"], {}, "Different data.max_length: "),
        ([], {"results": {"steps": 29}}, "have not learned for the same time"),
        ([], {"results": {"stopped": "early"}}, "b stopped early, at step 30."),
        ([], {"results": {"parameters": SHARE}}, "a run that trains more may fit better"),
        (["train.bf16=true"], {}, "Different train.bf16: false in a; true in b."),
        (["method.gate.kind=linear"], {}, "Different method.gate.kind: cosine in a; linear in b."),
        (["method.share_gate=false"], {}, "Different method.share_gate: true in a; false in b."),
        (["seed=7"], {}, "Different seeds"),
        ([], {"threads": 2}, "times and speeds are not comparable"),
        ([], {"kind": "peak allocated"}, "it is not the same measure"),
        ([], {"tasks": {"world": metric_entry("accuracy", 0.5, 8)}, "status": "running"},
         "b has not finished: its last logged step is 30."),
    ],
)  # fmt: skip
def test_each_condition_that_differs_is_said(
    make: Make, overrides: list[str], changes: dict[str, Any], words: str
) -> None:
    base = ["data.train_on_inputs=false", "train.warmup_steps=0"]
    found = compare_runs(read_runs([make("a", *base), make("b", *base, *overrides, **changes)]))
    assert any(words in note for note in found.notes), found.notes
    told = [note for note in found.notes if "No two runs have scores" not in note]
    assert len(told) == 1


@pytest.mark.parametrize(
    ("conditions", "words"),
    [
        ({"protocol": "generate"}, "Different protocols: rank in a; generate in b"),
        ({"limit": 5}, "Different limits: 9 in a; 5 in b (the scores are not of the same rows"),
        ({"rows_sha256": "2" * 64}, "Different scored rows of world: 8 rows (11111111) in a; "),
        ({"limited": True, "rows": 20}, "b was scored on a part of world (8 of 20 rows)."),
    ],
)
def test_each_condition_of_a_scoring_that_differs_is_said(
    make: Make, conditions: dict[str, Any], words: str
) -> None:
    folders = [make("a"), make("b")]
    for folder, given in zip(folders, ({}, conditions), strict=True):
        write_eval(folder, {"world": choice_items(RIGHT["a"])})
        path = folder / "eval" / "rank" / "results.json"
        results = json.loads(path.read_text())
        entry = results["tasks"]["world"] | {"rows_sha256": "1" * 64}
        of_task = {key: value for key, value in given.items() if key in {*entry, "limited"}}
        results |= given | {"limit": given.get("limit", 9), "tasks": {"world": entry | of_task}}
        path.write_text(json.dumps(results))
    (note,) = compare_runs(read_runs(folders)).notes
    assert words in note


def test_other_tasks_to_train_on_are_said(make: Make) -> None:
    runs = [
        make(task, f"data.tasks=[{task}]", recipe="glue/minilm/moc") for task in ("rte", "mrpc")
    ]
    notes = compare_runs(read_runs(runs)).notes
    assert "Different tasks to train on: rte in rte; mrpc in mrpc." in notes


def test_scores_of_other_controls_or_of_changed_files_are_not_trusted(make: Make) -> None:
    first, second = make("a"), make("b")
    write_eval(first, {"world": choice_items(RIGHT["a"])}, controls_sha256="0" * 64)
    write_eval(second, {"world": choice_items(RIGHT["b"])})
    (second / "eval" / "rank" / "samples.jsonl").write_text("{}\n")
    found = compare_runs(read_runs([first, second]))
    assert any("a holds other controls" in note for note in found.notes)
    assert any("does not match the hash in results.json" in r for r in found.notes)
    assert [one.low for one in found.differences] == [None]


def test_runs_that_cannot_be_compared(make: Make, tmp_path: Path) -> None:
    first, second = make("a"), make("b")
    glue = make(
        "glue",
        recipe="glue/minilm/moc",
        tasks={"mrpc": metric_entry("accuracy", 0.8, 8)},
    )
    (tmp_path / "seeds").mkdir()
    (tmp_path / "seeds" / "seeds.json").write_text("{}")
    same = first.parent / "b" / ".." / "a"
    for paths in ([first], [first, same], [first, tmp_path / "seeds"]):
        with refused(RunError):
            read_runs(paths)
    with refused(RunError):
        read_runs([first, tmp_path / "nowhere", tmp_path / "neither"])
    with refused(RunError):
        compare_runs(read_runs([first, second, glue]))
    with refused(RunError):
        compare_runs(read_runs([first, second]), tasks=["wrld"])


def test_unfinished_runs_are_shown_with_their_curves(make: Make, capsys, tmp_path: Path) -> None:
    first, second = make("a", status="running"), make("b", status="running")
    where = tmp_path / "out"
    assert run(["compare", str(first), str(second), "--output-dir", str(where), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err == ""
    assert [one["status"] for one in found["runs"]] == ["not finished", "not finished"]
    assert found["differences"] == found["missing_items"] == []
    assert "No two runs have scores: there are no differences to show." in found["notes"]
    assert json.loads((where / "comparison.json").read_text()) == found
    assert [Path(path).name for path in found["pictures"]] == ["loss.png", "loss.svg"]


def test_many_runs_are_split_over_tables(make: Make) -> None:
    folders = [make(f"run-with-a-rather-long-name-{number}") for number in range(6)]
    text = shown(read_runs(folders))
    assert "Runs 1 to 3 of 6" in text
    assert "Runs 4 to 6 of 6" in text
    text = shown(read_runs(folders[:4]))
    assert "Runs 1 to 2 of 4" in text
    assert "Runs 3 to 4 of 4" in text
    assert "Different" not in text


def test_names_are_as_long_as_they_must_be(make: Make) -> None:
    folders = [make("x/moc"), make("y/moc")]
    assert [one.name for one in read_runs(folders)] == ["x/moc", "y/moc"]
    other = make("x/control", "method=control", "method.sites=ffn", "method.rank=4")
    runs = read_runs([folders[0], other])
    assert [one.name for one in runs] == ["moc", "control"]
    assert method_name(runs[1]) == "control r4 ffn"


def test_curves_are_drawn_the_same_each_time(make: Make) -> None:
    runs = read_runs([make("a"), make("b", "train.per_device_train_batch_size=3")])
    drawn = draw_curves(runs)
    assert drawn["loss.png"].startswith(b"\x89PNG")
    for words in ("a, validation", "b, validation", "epoch", "Faint: as logged"):
        assert words in drawn["loss.svg"].decode()
    assert draw_curves(runs) == drawn
    for one in runs:
        one.lines.clear()
    assert draw_curves(runs) == {}


def test_smoothing_keeps_lines_and_ends() -> None:
    line = np.arange(100.0)
    np.testing.assert_allclose(smooth(line), line)
    noisy = np.random.default_rng(0).normal(size=400)
    assert smooth(noisy)[40:-40].std() < 0.25
    np.testing.assert_allclose(smooth(noisy[:39]), noisy[:39])
