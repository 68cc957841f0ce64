"""A run that is killed or interrupted ends as the one that was left alone: the short form.

`PYTHONPATH=tests:. python -m support.kill_trials` is the long one, at random moments.
"""

import signal
import subprocess
import sys
from pathlib import Path

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
    command = [sys.executable, "-m", "moc_cli", "train", str(recipe)]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    wait_for(folder / "checkpoints", lambda: process.poll() is not None)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "stopped after step" in said
    assert f"continue with: moc train {recipe} --resume auto" in said
    assert "Traceback" not in said
    finish(recipe, "--resume", "auto")
    assert differences(reference, fingerprint(folder)) == []
