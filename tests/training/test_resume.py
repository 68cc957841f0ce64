"""A run that is killed or interrupted ends as the one that was left alone: the short form.

`PYTHONPATH=tests:. python -m support.kill_trials` is the long one, at random moments.
"""

import signal
from pathlib import Path

import psutil
import pytest
from support.kill_trials import (
    differences,
    fingerprint,
    finish,
    kill_and_resume,
    make_model,
    untouched,
    wait_for,
    write_recipe,
)
from support.launched import Command

STEPS = 11


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory) -> tuple[Path, dict, float]:
    """The model, and what the untouched run left: its fingerprint, the seconds it took."""
    folder = tmp_path_factory.mktemp("resume")
    model = make_model(folder / "model")
    return model, *untouched(folder / "untouched", model, STEPS)


def test_dropout_was_on(left_alone):
    _, found, _ = left_alone
    states = {value for name, value in found.items() if name.endswith("rng.safetensors")}
    assert len(states) == sum(name.endswith("rng.safetensors") for name in found) >= 2


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_killed_and_resumed_equals_untouched(tmp_path, left_alone, share):
    model, reference, span = left_alone
    trial = kill_and_resume(tmp_path / "run", model, STEPS, share * span, reference)
    assert trial.differences == []


def test_ctrl_c_leaves_a_checkpoint_and_the_command_to_go_on(tmp_path, left_alone):
    model, reference, _ = left_alone
    folder = tmp_path / "run"
    recipe = write_recipe(folder, model, STEPS)
    moc = Command(["train", str(recipe)], tmp_path / "said")
    wait_for(folder / "checkpoints", lambda: not moc.process.is_alive())
    psutil.Process(moc.process.pid).send_signal(signal.SIGINT)
    said = moc.wait()
    assert said.code == 130
    assert "stopped after step" in said.err
    assert f"continue with: moc train {recipe} --resume auto" in said.err
    assert "Traceback" not in said.err
    finish(recipe, "--resume", "auto")
    assert differences(reference, fingerprint(folder)) == []
