"""What a refused resume is advised to do is accepted then."""

from typing import Any

import pytest
from support.messages import refused

from moc_cli.errors import MocError, RunError
from moc_cli.recipe.load import load_recipe
from moc_cli.training.changes import check_recipe
from moc_cli.training.checkpoint import Checkpoints, Counters, Snapshot
from moc_cli.training.gradients import WindowSum
from moc_cli.training.loop_types import Settings
from moc_cli.training.resume import check_facts, keep_place
from moc_cli.training.step_errors import refusal

SIZE, STEPS = "train.per_device_train_batch_size", "train.gradient_accumulation_steps"


def snapshot(processes: int, size: int, steps: int) -> Snapshot:
    saved = load_recipe("quickstart", [f"{SIZE}={size}", f"{STEPS}={steps}"])
    identity = {"recipe": saved.model_dump(mode="json"), "processes": processes}
    return Snapshot(Counters(step=3, batch=6), {}, {}, {}, identity)


def test_inside_an_epoch_in_another_number_of_processes() -> None:
    two, now = snapshot(2, 8, 1), load_recipe("quickstart")  # one process with 16 rows
    with refused(RunError):
        keep_place(two, now)
    told = load_recipe("quickstart", [f"{SIZE}=8", f"{STEPS}=2"])
    check_recipe(two.identity["recipe"], told.model_dump(mode="json"), (2, 1))
    assert keep_place(two, told) == (two, [])
    with refused(RunError):  # two processes cannot share 16 rows as micro-batches of 16
        keep_place(snapshot(1, 16, 1), load_recipe("quickstart", [f"{SIZE}=8"]), 2)


def facts(strategy: str, held_out: int) -> dict[str, Any]:
    recipe = load_recipe("quickstart", [f"eval.eval_strategy={strategy}"])
    data = {"train": {"rows": 9 - held_out, "sha256": str(held_out)}}
    data |= {"validation": {"rows": held_out, "sha256": str(held_out)}}
    return {"recipe": recipe.model_dump(mode="json"), "data": data}


def test_rows_that_are_held_out_since_they_are_watched() -> None:
    with refused(RunError):
        check_facts(facts("no", 0), facts("epoch", 2))
    with refused(RunError):
        check_facts(facts("epoch", 2), facts("no", 0))
    with refused(RunError):  # other rows
        check_facts(facts("epoch", 2), facts("epoch", 3))


@pytest.mark.parametrize("gate", [None, 0.3])
def test_a_gate_with_a_rate_of_its_own_is_lowered_too(tmp_path, gate) -> None:
    error = refusal(
        WindowSum([float("nan")], 1.0, fits=True, signal=None),
        [[0]],
        [],
        (Counters(step=3), 9),
        Settings(learning_rate=0.03, gate_learning_rate=gate),
        "moc train mine.yaml --resume auto",
        Checkpoints(tmp_path),
    )
    with refused(MocError):
        raise error
