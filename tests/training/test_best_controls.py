"""Which controls a run keeps."""

from safetensors.torch import load_file
from support.key_runs import KeyRun, make_bases

from moc_cli.adapter.folder import PAYLOAD
from moc_cli.cli import run
from moc_cli.kinds.choice import Choice
from moc_cli.runs import RunFolder
from moc_cli.training.checkpoint import read_checkpoint


def test_the_controls_of_the_best_step_are_kept(tmp_path, monkeypatch):
    make_bases(tmp_path)
    monkeypatch.chdir(tmp_path)
    watched = iter([{"accuracy": 0.9}, {"accuracy": 0.4}])
    monkeypatch.setattr(Choice, "watch", lambda *_: next(watched))
    steps = {"train.max_steps": 2, "eval.eval_strategy": "steps", "eval.eval_steps": 1}
    short = {"eval.before": False, "eval.max_samples": 1}
    run = KeyRun("choices.yaml", tmp_path / "kept", steps | short)
    assert run.finished["controls"] == {"step": 1, "chosen": "best accuracy"}
    folder = tmp_path / "kept" / "run"
    saved = load_file(folder / "controls" / PAYLOAD)
    first, last = (
        read_checkpoint(folder / f"checkpoints/step-{step:06}").trainables for step in (1, 2)
    )
    assert all(values.equal(first[name]) for name, values in saved.items())
    assert not all(values.equal(last[name]) for name, values in saved.items())


def test_the_last_steps_of_a_run_that_stops_early_are_logged(tmp_path, monkeypatch):
    make_bases(tmp_path)
    monkeypatch.chdir(tmp_path)
    watched = iter([{"accuracy": 0.9}, {"accuracy": 0.4}])
    monkeypatch.setattr(Choice, "watch", lambda *_: next(watched))
    patience = {"eval.early_stopping_patience": 1, "eval.eval_strategy": "steps"}
    steps = {"train.max_steps": 9, "eval.eval_steps": 2, "output.logging_steps": 3}
    short = {"eval.before": False, "eval.max_samples": 1}
    run = KeyRun("choices.yaml", tmp_path / "kept", patience | steps | short)
    assert (run.finished["stopped"], run.finished["steps"]) == ("early", 4)
    lines = RunFolder(tmp_path / "kept" / "run").read_metrics()
    assert [line["step"] for line in lines if "loss" in line] == [3, 4]
    newest = read_checkpoint(tmp_path / "kept" / "run" / "checkpoints" / "step-000004")
    assert newest.counters.log_lines == len(lines)


def test_a_run_that_goes_on_without_evaluation_keeps_its_last_controls(tmp_path, choices, capsys):
    short = ["--set", "eval.before=false", "--set", "eval.max_samples=1"]
    watched = ["--set", "eval.eval_strategy=steps", "--set", "eval.eval_steps=2"]
    assert run([*choices, *short, *watched]) == 0
    folder = RunFolder(tmp_path / "run")
    best = folder.read_results()["validation"]["step"]
    longer = ["--set", "train.max_steps=8", "--set", "eval.eval_strategy=no"]
    capsys.readouterr()
    assert run([*choices, *short, *longer, "--resume", "auto"]) == 0
    assert (
        f"step {best} was the best so far, but eval.eval_strategy is no" in capsys.readouterr().err
    )
    results = folder.read_results()
    assert results["controls"] == {"step": 8, "chosen": "last"}
    assert results["validation"] is None
    last = read_checkpoint(folder.checkpoints / "step-000008").trainables
    saved = load_file(folder.controls / PAYLOAD)
    assert all(values.equal(last[name]) for name, values in saved.items())
