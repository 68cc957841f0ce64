"""The recipe alone says how to train: variables of launchers are named and do not count."""

from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DynamoBackend
from support.group import as_launched, run_together

from moc_cli import processes
from moc_cli.cli import run
from moc_cli.processes import Processes
from moc_cli.recipe.launch import LaunchSection
from moc_cli.training.accelerator import make_accelerator


@pytest.fixture(autouse=True)
def new_state() -> None:
    """Forget the accelerators of other tests, which a new one would take its values from."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_CPU", "1"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("LOCAL_RANK", "1"),
    ],
)
def test_variables_of_launchers_change_nothing(
    name: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(name, value)
    accelerator = make_accelerator(LaunchSection(device="cpu"), (), tmp_path)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.state.dynamo_plugin.backend == DynamoBackend.NO
    assert accelerator.device.type == "cpu"
    assert accelerator.num_processes == 1
    assert accelerator.local_process_index == 0
    assert (name in capsys.readouterr().err) == (name != "LOCAL_RANK")


def test_what_accelerate_launch_always_sets_is_not_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MIXED_PRECISION", "DYNAMO_BACKEND", "USE_CPU"):
        monkeypatch.setenv(f"ACCELERATE_{name}", "no")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    make_accelerator(LaunchSection(device="cpu"), (), tmp_path)
    assert capsys.readouterr().err == ""


def test_commands_of_one_process_refuse_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(["recipes", "show", "quickstart"]) == 0
    for name, value in (as_launched(0, 2, 29500) | {"OMP_NUM_THREADS": "1"}).items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert run(["recipes", "show", "quickstart"]) == 2
    error = capsys.readouterr().err
    assert "moc recipes runs in one process" in error
    assert "a launcher started several: WORLD_SIZE=2" in error


def joined(group: Processes, folder: Path) -> None:
    accelerator = make_accelerator(LaunchSection(device="cpu", ddp_timeout=60), (), folder)
    assert (accelerator.num_processes, accelerator.process_index) == (2, group.rank)
    assert accelerator.device.type == "cpu"
    assert accelerator.gradient_accumulation_steps == 1
    assert processes.current().seconds == 60


def test_processes_that_a_launcher_has_started_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    run_together(joined, 2, tmp_path)
