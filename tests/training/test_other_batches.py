"""A run goes on with other micro-batches where a step sees the same rows, or says why it cannot."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from support.tiny_runs import choices_run

from moc_cli.adapter.folder import read_adapter
from moc_cli.cli import run
from moc_cli.training.checkpoint import read_checkpoint

# 20 rows, 4 held out, 6 a step: 3 steps an epoch, the last of 4 rows.
EVERY_STEP = ["--set", "output.save_steps=1", "--set", "output.save_total_limit=null"]
SHORT = ["--set", "train.max_steps=4", "--set", "eval.before=false", "--set", "eval.max_samples=1"]
CONTROL = ["--set", "method=control", "--set", "method.rank=2"]


def other_batches(size: int, steps: int) -> list[str]:
    return [
        *("--set", f"train.per_device_train_batch_size={size}"),
        *("--set", f"train.gradient_accumulation_steps={steps}"),
    ]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[list[str], Path]]:
    """Runs of 3x2 rows, with and without groups by length: their arguments and folders."""
    runs = {}
    for grouped in ("false", "true"):
        home = tmp_path_factory.mktemp("batches")
        grouping = ["--set", f"train.group_by_length={grouped}"]
        arguments = [*choices_run(home), *EVERY_STEP, *SHORT, *CONTROL, *grouping]
        assert run([*arguments, "--json"]) == 0
        runs[grouped] = (arguments, home / "run")
    return runs


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load(read_adapter(folder / "controls").payload())


@pytest.mark.parametrize("batches", [(6, 1), (2, 3), (1, 6)])
def test_the_same_rows_a_step_give_the_same_run(made, tmp_path, capsys, batches):
    arguments, folder = made["false"]
    resume = ["--resume", str(folder / "checkpoints" / "step-000001")]
    other = tmp_path / "other"
    assert run([*arguments, *other_batches(*batches), *resume, "--output-dir", str(other)]) == 0
    assert f"micro-batches of {batches[0]} rows, 3 before; 6 rows a step" in capsys.readouterr().err
    for name, value in trained(folder).items():
        assert torch.allclose(value, trained(other)[name], atol=1e-4), name
    before, after = (read_checkpoint(f / "checkpoints" / "step-000004") for f in (folder, other))
    assert after.counters.examples == before.counters.examples
    assert after.counters.batch * batches[0] == before.counters.batch * 3


def test_inside_an_epoch_of_rows_by_length_it_is_refused(made, tmp_path, capsys):
    arguments, folder = made["true"]
    command = [*arguments, *other_batches(6, 1)]
    step = folder / "checkpoints" / "step-00000{}"
    other = ["--output-dir", str(tmp_path / "other")]
    assert run([*command, "--resume", str(step).format(1), *other]) == 2
    said = capsys.readouterr().err
    assert "step 1 lies inside an epoch" in said
    assert "train.per_device_train_batch_size=3" in said
    assert not (tmp_path / "other").exists()
    assert run([*command, "--resume", str(step).format(3), *other]) == 0  # an epoch's end


def test_other_rows_a_step_are_another_run(made, tmp_path, capsys):
    arguments, folder = made["false"]
    copy = shutil.copytree(folder, tmp_path / "run")
    command = [*arguments, *other_batches(4, 2), "--resume", "auto", "--output-dir", str(copy)]
    assert run(command) == 2
    assert "per_device_train_batch_size (3 then, 4 now)" in capsys.readouterr().err
