"""One training by several processes: the same weights, lines and checkpoints as by one alone."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from support.group import run_together
from support.messages import refused
from support.models import make_tiny
from support.tiny_runs import without_measured
from support.toy import Plan, toy_collate

from moc_cli.errors import MocError, RunError
from moc_cli.kinds.loss import TaskLoss
from moc_cli.methods import attach
from moc_cli.processes import Elsewhere, Processes
from moc_cli.recipe.methods import ControlMethod, LoraMethod, MocMethod
from moc_cli.training.changes import check_recipe
from moc_cli.training.checkpoint import Checkpoints, read_checkpoint
from moc_cli.training.interrupt import Interrupt, Interrupted
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop import Loop
from moc_cli.training.loop_types import Data, Settings

METHODS: dict[str, Any] = {
    "moc": MocMethod(rank=4, top_k=2, routing={"level": "sample"}, gate={"projection_dim": 8}),
    "sync": MocMethod(rank=4, top_k=2, routing={"sync": True}, gate={"projection_dim": 8}),
    "control": ControlMethod(rank=4),
    "lora": LoraMethod(rank=4, alpha=8, dropout=0.0),
    "lora, dropout": LoraMethod(rank=4, alpha=8, dropout=0.3),
}
SEPARATE = ("moc", "control", "lora")  # their micro-batches do not depend on each other
IN_FOUR = ("moc", "sync", "lora, dropout")
# Nine micro-batches an epoch, four a window: the third window has one, for one process alone.
PLAN = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(9)]
STEPS = 5
SETTINGS = Settings(
    seed=3,
    learning_rate=0.02,
    # At 1e-8 AdamW's first step makes a gradient that is mere rounding as large as any other one.
    epsilon=1e-4,
    max_steps=STEPS,
    gradient_accumulation_steps=4,
    logging_steps=2,
    save_strategy="steps",
    save_steps=1,
)


def make_rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for index in range(27):
        tokens = torch.randint(5, 200, (4 + 5 * index % 7,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": [-100, -100, *tokens[2:]]})
    return rows


def make_loop(
    method: str, folder: Path, settings: Settings, plan: list[list[int]] = PLAN, **more: Any
) -> Loop:
    folder.mkdir(exist_ok=True)
    rows = make_rows()
    adapted = attach(make_tiny("llama"), METHODS[method], seed=1)
    return Loop(
        adapted,
        Data(Plan(plan), lambda numbers: toy_collate(rows, numbers)),
        settings,
        accelerator=Accelerator(cpu=True),
        checkpoints=Checkpoints(folder / "checkpoints"),
        log=MetricsLog(folder / "metrics.jsonl"),
        **more,
    )


def train(
    method: str, folder: Path, world: int, resume: Path | None = None, joined: int = 1
) -> None:
    """Train in `world` processes; `joined` micro-batches are one."""
    plan = [sum(PLAN[i : i + joined], []) for i in range(0, len(PLAN), joined)]
    steps = 4 // world // joined
    settings = replace(
        SETTINGS,
        gradient_accumulation_steps=steps,
        processes=world,
        routing_sync=method == "sync",
    )
    snapshot = None if resume is None else read_checkpoint(resume)
    make_loop(method, folder, settings, plan).run(resume=snapshot)


def weights(folder: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return read_checkpoint(folder / "checkpoints" / f"step-{step:06d}").trainables


def farthest(folder: Path, other: Path) -> float:
    mine, theirs = weights(folder), weights(other)
    assert mine.keys() == theirs.keys()
    return max((mine[name] - theirs[name]).abs().max().item() for name in mine)


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text()
    return [without_measured(json.loads(line)) for line in text.splitlines()]


def same_lines(folder: Path, other: Path, leave_out: frozenset[str] = frozenset()) -> bool:
    """Whether all numbers agree: sums over rows to rounding, counts and routes exactly."""

    def close(name: str, value: Any, wanted: Any) -> bool:
        if name in ("loss", "balance_loss", "grad_norm") and value is not None:
            return value == pytest.approx(wanted, rel=2e-5)
        return value == wanted

    mine, theirs = lines(folder), lines(other)
    assert [line["step"] for line in mine] == [2, 4, STEPS]
    return all(
        a.keys() == b.keys() and all(close(key, a[key], b[key]) for key in a.keys() - leave_out)
        for a, b in zip(mine, theirs, strict=True)
    )


def choices(folder: Path) -> Any:
    """The choices since the last line, of a checkpoint between two lines."""
    return read_checkpoint(folder / "checkpoints" / "step-000003").counters.choices


def joint(group: Processes, folder: Path) -> None:
    world = group.world
    for method in METHODS if world == 2 else IN_FOUR:
        train(method, folder / f"{method} {world}", world)
    train("moc", folder / f"on {world}", world, folder / "moc 1" / "checkpoints" / "step-000002")
    if world == 2:
        stops(group, folder / "stopped")
        refusals(group, folder)


def stops(group: Processes, folder: Path) -> None:
    """A signal to one process stops all after the same step."""
    interrupt, settings = Interrupt(), replace(SETTINGS, processes=2, save_strategy="no")
    loop = make_loop("moc", folder, settings, interrupt=interrupt)

    def observe(report: Any) -> None:
        if group.rank == 1 and report.step == 2:
            interrupt.received = signal.SIGTERM

    with pytest.raises(Interrupted, match="stopped after step 3 of 5") as caught:
        loop.run(observe=observe)
    assert caught.value.exit_code == 128 + signal.SIGTERM


def refusals(group: Processes, folder: Path) -> None:
    """What one process cannot do, none does; the state before the step is kept."""
    settings = replace(SETTINGS, gradient_accumulation_steps=2, processes=2, save_strategy="no")
    loop = make_loop("control", folder / "short", settings)
    task_loss = TaskLoss.__call__

    def short(self: TaskLoss, batch: dict[str, torch.Tensor], targets: int) -> torch.Tensor:
        if group.rank == 1 and loop.counters.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return task_loss(self, batch, targets)

    TaskLoss.__call__ = short  # type: ignore[method-assign]
    with pytest.raises(MocError, match="does not fit in memory") as caught:
        loop.run()
    assert isinstance(caught.value, Elsewhere) == (not group.main)

    def broken(self: TaskLoss, batch: dict[str, torch.Tensor], targets: int) -> torch.Tensor:
        bad = group.rank == 1 and loop.counters.step == 1
        return task_loss(self, batch, targets) * (float("nan") if bad else 1)

    TaskLoss.__call__ = broken  # type: ignore[method-assign]
    loop = make_loop("control", folder / "nan", settings)
    rows = "micro-batch 6, 8 of 9, training rows 15, 16, 17, 21, 22, 23"
    with pytest.raises(MocError, match=f"at step 2, epoch 1, {rows}"):
        loop.run()
    TaskLoss.__call__ = task_loss  # type: ignore[method-assign]


def test_several_processes_train_what_one_does(tmp_path: Path) -> None:
    for method in METHODS:
        train(method, tmp_path / f"{method} 1", 1)
    for world in (2, 4):
        run_together(joint, world, tmp_path)
        for method in SEPARATE if world == 2 else ("moc",):
            alone, together = (tmp_path / f"{method} {n}" for n in (1, world))
            assert farthest(alone, together) < 1e-6, method
            assert same_lines(alone, together), method
            assert choices(alone) == choices(together), method
        assert farthest(tmp_path / "moc 1", tmp_path / f"on {world}") < 1e-6
        # Those that vote together are one batch.
        train("sync", tmp_path / f"sync as {world}", 1, joined=world)
        alone, together = tmp_path / f"sync as {world}", tmp_path / f"sync {world}"
        assert farthest(alone, together) < 1e-6
        assert choices(alone) == choices(together)
        assert same_lines(alone, together, leave_out=frozenset({"epoch"}))  # of other micro-batches
    # Dropout of several processes is that of each micro-batch.
    assert farthest(tmp_path / "lora, dropout 2", tmp_path / "lora, dropout 4") < 1e-6
    assert farthest(tmp_path / "lora, dropout 1", tmp_path / "lora, dropout 2") > 1e-3
    assert Checkpoints(tmp_path / "stopped" / "checkpoints").steps() == [3]
    assert Checkpoints(tmp_path / "short" / "checkpoints").steps() == [1]
    assert Checkpoints(tmp_path / "nan" / "checkpoints").steps() == [1]


def test_other_processes_go_on_with_as_many_rows_a_step() -> None:
    def recipe(steps: int) -> dict[str, Any]:
        train = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": steps}
        return {"train": train, "seed": 1}

    assert check_recipe(recipe(4), recipe(1), (1, 4)) == [
        "processes: 1 -> 4; 32 rows a step as before; dropout draws other masks"
    ]
    assert check_recipe(recipe(2), recipe(1), (2, 4)) == [
        "processes: 2 -> 4; 32 rows a step as before"
    ]
    assert check_recipe(recipe(4), recipe(4), (2, 2)) == []
    with refused(RunError):
        check_recipe(recipe(4), recipe(4), (1, 2))
    with refused(RunError):
        check_recipe(recipe(4), recipe(4), (1, 3))
