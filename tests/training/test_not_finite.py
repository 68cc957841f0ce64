"""What a run that diverges is advised to do helps."""

import shlex
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moc_cli.cli import run
from moc_cli.kinds.loss import TaskLoss
from moc_cli.runs import RunFolder
from moc_cli.training.checkpoint import read_checkpoint

SHORT = ["--set", "train.max_steps=4", "--set", "eval.before=false"]


def largest(state: dict[str, Tensor]) -> float:
    return max(value.abs().max().item() for name, value in state.items() if name.endswith(".B"))


@pytest.fixture
def limit(tmp_path: Path, choices: list[str]) -> float:
    """What no B may exceed: in a run that is left alone one does so in its third step."""
    folder = tmp_path / "alone"
    every = ["--set", "output.save_steps=1", "--set", "output.save_total_limit=4"]
    assert run([*choices, *SHORT, *every, "--output-dir", str(folder)]) == 0
    second, third = (
        largest(read_checkpoint(folder / f"checkpoints/step-{step:06}").trainables)
        for step in (2, 3)
    )
    assert second < third
    return (second + third) / 2


def diverge(limit: float, monkeypatch: pytest.MonkeyPatch, *, after: int = 0) -> None:
    """From the call numbered `after` on the loss is NaN where a B is beyond the limit."""
    usual, calls = TaskLoss.__call__, []

    def loss(self: TaskLoss, batch: dict[str, Tensor], targets: int) -> Tensor:
        calls.append(targets)
        value = usual(self, batch, targets)
        beyond = len(calls) > after and largest(dict(self.model.named_parameters())) > limit
        return value * torch.nan if beyond else value

    monkeypatch.setattr(TaskLoss, "__call__", loss)


def advice(error: str) -> list[str]:
    """The command that an error proposes, as the words after `moc`."""
    return shlex.split(error.partition("lower rate: moc ")[2].splitlines()[0])


def test_an_earlier_checkpoint_and_a_lower_rate(tmp_path, choices, limit, capsys, monkeypatch):
    diverge(limit, monkeypatch)
    capsys.readouterr()
    assert run([*choices, *SHORT]) == 2
    error = capsys.readouterr().err
    assert "the loss is nan at step 4" in error
    lower = ["--resume", "auto", "--set", "train.learning_rate=0.0001"]
    assert run([*choices, *SHORT, *lower]) == 2  # from the kept state no rate helps
    command = advice(error)
    assert str(tmp_path / "run" / "checkpoints" / "step-000002") in command
    assert run(command) == 0
    assert RunFolder(tmp_path / "run").read_results()["steps"] == 4


def test_from_the_start_where_nothing_is_earlier(tmp_path, choices, limit, capsys, monkeypatch):
    diverge(limit, monkeypatch)
    unsaved = ["--set", "output.save_strategy=no"]
    capsys.readouterr()
    assert run([*choices, *SHORT, *unsaved]) == 2
    command = advice(capsys.readouterr().err)
    assert "--overwrite" in command
    assert run(command) == 0
    assert RunFolder(tmp_path / "run").read_results()["steps"] == 4


def test_all_seeds_from_the_start(tmp_path, choices, limit, capsys, monkeypatch):
    diverge(limit, monkeypatch, after=8)  # the first seed's four steps of two micro-batches
    capsys.readouterr()
    assert run([*choices, *SHORT, "--seeds", "2"]) == 2
    error = capsys.readouterr().err
    assert (tmp_path / "run" / "seed-43" / "checkpoints" / "step-000002").is_dir()
    assert run(advice(error)) == 0
    recipes = [
        RunFolder(tmp_path / "run" / f"seed-{seed}").read_recipe(trust_remote_code=False)
        for seed in (42, 43)
    ]
    assert {recipe.train.learning_rate for recipe in recipes} == {0.0033}
