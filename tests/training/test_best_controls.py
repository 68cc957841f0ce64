"""Which controls a run keeps."""

from safetensors.torch import load_file
from support.key_runs import KeyRun, make_bases

from moc_cli.adapter.folder import PAYLOAD
from moc_cli.kinds.choice import Choice
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
