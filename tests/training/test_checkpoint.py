"""Checkpoints against kills, full disks and flipped bits."""

import errno
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.messages import refused
from support.processes import killed_at
from support.toy import ToyAdapted, snapshot, toy_data, toy_fit

from moc_cli.errors import FileError, MocError, RunError
from moc_cli.training import checkpoint, optim, rng
from moc_cli.training.checkpoint import (
    Checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop_types import Settings

PARTS = ("trainables.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
SETTINGS = Settings(num_train_epochs=1, save_strategy="steps", save_steps=2, logging_steps=1)
BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7]]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_round_trip(tmp_path):
    made = snapshot()
    path = Checkpoints(tmp_path).save(made)
    assert path.name == "step-000004"
    assert sorted(os.listdir(path)) == sorted(PARTS)
    back = read_checkpoint(path)
    assert (back.counters, back.identity) == (made.counters, made.identity)
    assert same(back.trainables, made.trainables)
    assert same(back.optimizer, made.optimizer)
    assert same(back.rng, made.rng)


def test_random_states_come_back():
    torch.rand(1)
    random.gauss(0, 1)  # leaves a second value waiting
    np.random.randn()

    def draw() -> list[float]:
        torch_part = [*torch.rand(3).tolist(), torch.randn(()).item()]
        return [*torch_part, random.gauss(0, 1), random.random(), *np.random.randn(3).tolist()]

    state = rng.capture()
    expected = draw()
    rng.seed_everything(99)
    assert draw() != expected
    rng.restore(state)
    assert draw() == expected


def test_optimizer_comes_back_by_name(tmp_path):
    named = {n: torch.nn.Parameter(torch.randn(2, 3)) for n in ("b", "gates.x", "a")}
    settings = Settings(learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.99))

    def step(values: dict, optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name in sorted(values):
            values[name].grad = torch.randn(2, 3, generator=generator)
        optimizer.step()

    optimizer = optim.build_optimizer(named, {"gates.x"}, settings)
    step(named, optimizer, 1)
    tensors = optim.optimizer_tensors(optimizer, named)
    # The same parameters in another order, as another process may name them.
    other = {n: torch.nn.Parameter(named[n].detach().clone()) for n in ("a", "b", "gates.x")}
    second = optim.build_optimizer(other, {"gates.x"}, settings)
    optim.load_optimizer_tensors(second, other, tensors)
    step(named, optimizer, 2)
    step(other, second, 2)
    assert same(dict(named), dict(other))
    with refused(MocError):
        optim.load_optimizer_tensors(second, other, {"c.exp_avg": torch.ones(2, 3)})
    with refused(MocError):
        optim.load_optimizer_tensors(second, other, {"a.exp_avg": torch.ones(3, 2)})


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_anywhere_is_seen(tmp_path, part):
    path = Checkpoints(tmp_path).save(snapshot())
    content = (path / part).read_bytes()
    reason = {"reason": "(?<=damaged: ).*"} if part == "state.json" else {}
    for position in range(0, len(content), max(1, len(content) // 40)):
        spoiled = bytearray(content)
        spoiled[position] ^= 1
        (path / part).write_bytes(spoiled)
        with refused(RunError, **reason):
            read_checkpoint(path)
    (path / part).write_bytes(content)
    read_checkpoint(path)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_or_cut_file_is_seen(tmp_path, part):
    path = Checkpoints(tmp_path).save(snapshot())
    content = (path / part).read_bytes()
    cut, reason = (3, {"reason": "(?<=read: ).*"}) if part == "state.json" else (1, {})
    (path / part).write_bytes(content[:-cut])
    with refused(RunError, **reason):
        read_checkpoint(path)
    (path / part).unlink()
    with refused(RunError):
        read_checkpoint(path)


@pytest.mark.parametrize("part", PARTS)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, part):
    path = Checkpoints(tmp_path).save(snapshot())
    (path / part).unlink()
    os.mkfifo(path / part)
    with refused(RunError):
        read_checkpoint(path)


def test_lines_of_a_log_are_kept_byte_by_byte(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"a": "\xff\xe2\x80\xa8"}\n{"b": 1}\n{"c"')
    log = MetricsLog(file)
    log.keep(1)
    assert file.read_bytes() == b'{"a": "\xff\xe2\x80\xa8"}\n'
    assert log.lines == 1


def test_state_of_another_shape_is_damaged(tmp_path):
    """A whole JSON file whose digest is right, but which holds something else."""
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(snapshot())
    good = json.loads((path / "state.json").read_text())
    changes = {
        "counters.step": {"counters": good["counters"] | {"step": "four"}},
        "counters": {"counters": []},
        "files": {"files": None},
        "identity": {"identity": 3},
        "format": {"format": True},
    }
    (tmp_path / "step-\u00b2").mkdir()
    (tmp_path / ("step-" + "9" * 60)).mkdir()
    for key, change in changes.items():
        state = good | change
        del state["digest"]
        text = json.dumps(state | {"digest": checkpoint.digest_of(state)})
        (path / "state.json").write_text(text)
        said = []
        with refused(RunError):
            checkpoints.newest(said.append)
        assert f"is damaged: {path}/state.json cannot be read: {key}: " in said[0]
        assert said[0].endswith("; trying the one before")
    for text in ("[" * 100_000, "{"):
        (path / "state.json").write_text(text)
        with refused(RunError, reason="(?<=not JSON: ).*"):
            read_checkpoint(path)
    for text in ("[]", '{"digest": 1}'):
        (path / "state.json").write_text(text)
        with refused(RunError):
            read_checkpoint(path)


def test_newest_passes_over_the_damaged_and_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4, 6):
        checkpoints.save(snapshot(step))
    (checkpoints.path(6) / "optimizer.safetensors").write_bytes(b"")
    said: list[str] = []
    path, found = checkpoints.newest(said.append)
    assert (path, found.counters.step) == (checkpoints.path(4), 4)
    assert len(said) == 1
    assert "step-000006" in said[0]
    assert "optimizer.safetensors" in said[0]
    for step in (2, 4):
        (checkpoints.path(step) / "state.json").unlink()
    with refused(RunError):
        checkpoints.newest(said.append)


def test_no_checkpoint_is_not_an_error(tmp_path):
    assert Checkpoints(tmp_path / "none").newest(pytest.fail) is None
    assert Checkpoints(tmp_path).newest(pytest.fail) is None


def test_steps_after_the_resumed_one_are_set_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (2, 4, 6):
        checkpoints.save(snapshot(step))
    for _ in range(2):
        moved = checkpoints.set_aside_after(2)
        assert [path.name for path in moved] == ["step-000004", "step-000006"]
        assert checkpoints.steps() == [2]
        checkpoints.save(snapshot(4))
        checkpoints.save(snapshot(6))
    assert read_checkpoint(tmp_path / "set-aside/step-000006").counters.step == 6


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (None, None, [1, 2, 3, 4, 5]),
        (1, None, [5]),
        (2, None, [4, 5]),
        (3, 2, [2, 4, 5]),
        (2, 2, [2, 5]),
        (1, 2, [2, 5]),
        (2, 5, [4, 5]),
    ],
)
def test_the_limit_spares_best_and_last(tmp_path, limit, best, kept):
    checkpoints = Checkpoints(tmp_path, limit)
    for step in range(1, 6):
        checkpoints.save(snapshot(step, best if best and best <= step else None))
    assert checkpoints.steps() == kept
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:06d}" for step in kept]


def calls(monkeypatch, owner: object, name: str, failing: int | None) -> list[int]:
    """Count the calls of a function; the one numbered `failing` finds the disk full."""
    original, count = getattr(owner, name), [0]

    def wrapped(*args, **options):
        count[0] += 1
        if count[0] == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **options)

    monkeypatch.setattr(owner, name, wrapped)
    return count


@pytest.mark.parametrize(
    ("owner", "name"),
    [(Path, "write_bytes"), (Path, "write_text"), (os, "fsync"), (Path, "mkdir"), (os, "rename")],
)
@pytest.mark.parametrize("again", [False, True], ids=["new", "same step"])
def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch, owner, name, again):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(snapshot(2))
    before = {p.name: p.read_bytes() for p in checkpoints.path(2).iterdir()}
    second = replace(snapshot(2 if again else 4), trainables={"a": torch.zeros(3, 5)})
    with monkeypatch.context() as patch:
        count = calls(patch, owner, name, None)
        write_checkpoint(tmp_path / "elsewhere" / "step-000002", second)
    needed = count[0]
    assert needed > 0
    for failing in range(1, needed + 1):
        with monkeypatch.context() as patch:
            calls(patch, owner, name, failing)
            if name == "fsync" and failing == needed:
                continue  # the folder's own entry: the rename is done by then
            with refused(FileError):
                checkpoints.save(second)
        assert os.listdir(tmp_path / "step-000002")
        found = checkpoints.newest(pytest.fail)
        assert found is not None
        assert found[1].counters.step == 2
        assert {p.name: p.read_bytes() for p in checkpoints.path(2).iterdir()} == before
        assert sorted(os.listdir(tmp_path)) == ["elsewhere", "step-000002"]


def test_a_full_disk_stops_training_with_the_previous_checkpoint(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        calls(patch, Path, "write_bytes", failing=3 + 1 + 2)  # the second file of the second save
        with refused(FileError):
            toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), SETTINGS)
    found = Checkpoints(tmp_path / "checkpoints").newest(pytest.fail)
    assert found[1].counters.step == 2
    whole = tmp_path / "whole"
    toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), SETTINGS, resume=found[1])
    toy_fit(whole, ToyAdapted(), toy_data(BATCHES), SETTINGS)
    name = "checkpoints/step-000004/trainables.safetensors"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def dying_disk(dying) -> None:
    os.fsync, os.rename = dying(os.fsync), dying(os.rename)
    Path.write_bytes, Path.mkdir = dying(Path.write_bytes), dying(Path.mkdir)


@pytest.mark.parametrize(("left", "old"), [(4, True), (11, True), (12, False)])
def test_a_kill_in_mid_save_leaves_the_old_checkpoint_or_the_new(tmp_path, left, old):
    """Killed at its n-th touch of the disk, while it replaces the checkpoint of the same step.

    The touch after 11 others comes between the two renames; after 12, all is done but a flush.
    """
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(replace(snapshot(2), identity={"old": True}))
    assert killed_at(left, dying_disk, lambda: checkpoints.save(snapshot(2)))
    assert ("step-000002" in os.listdir(tmp_path)) == (left != 11)
    found = Checkpoints(tmp_path).newest(pytest.fail)
    assert found is not None
    assert found[1].identity == ({"old": True} if old else snapshot(2).identity)
    assert os.listdir(tmp_path) == ["step-000002"]
