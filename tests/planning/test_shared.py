"""Plans of several processes: what each holds, and what it sends."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from support.models import tiny_config
from torch import nn

from moc_cli.cli import run
from moc_cli.planning import session, shared
from moc_cli.planning.batches import Rows
from moc_cli.planning.footprint import Footprint
from moc_cli.planning.links import LINKS, Link, all_gather, all_reduce
from moc_cli.planning.plans import Planner
from moc_cli.planning.shared import Launch, in_one_of, launch_of, traffic_of, votes_of
from moc_cli.processes import Processes
from moc_cli.recipe.load import load_recipe
from moc_cli.training import build

LAYERS = 10
PHASES = ("forward", "loss", "backward", "optimizer")
PARTS = {"weights": 10_400, "controls": 40}
ALONE = Footprint(dict.fromkeys(PHASES, PARTS), None, trained=10)


@pytest.fixture
def model() -> Any:
    """Ten layers of 1,000 bytes each, and 400 bytes outside of them."""
    outside, inside = nn.Parameter(nn.Linear(10, 10).weight), nn.Parameter(nn.Linear(5, 5).weight)
    named = {"embed.weight": outside, "layers.0.weight": inside}
    config = tiny_config("qwen3", num_hidden_layers=LAYERS, layer_types=None)
    return SimpleNamespace(named_parameters=named.items, config=config)


def all_reduced_in_a_ring(numbers: list[list[int]]) -> list[int]:
    """Sum lists in a ring, as libraries do; return how many numbers each process has sent."""
    count = len(numbers)
    size = len(numbers[0]) // count
    wanted = [sum(column) for column in zip(*numbers, strict=True)]
    sent = [0] * count
    for turn in range(2 * (count - 1)):
        packets = []
        for rank in range(count):
            at = (rank - turn) % count * size
            packets.append((at, numbers[rank][at : at + size]))
            sent[rank] += size
        for rank, (at, packet) in enumerate(packets):
            to = numbers[(rank + 1) % count]
            adds = turn < count - 1
            to[at : at + size] = [
                p + adds * t for p, t in zip(packet, to[at : at + size], strict=True)
            ]
    assert all(result == wanted for result in numbers)
    return sent


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_the_formula_is_what_a_ring_sends(processes: int) -> None:
    size = 12
    sent = all_reduced_in_a_ring([[rank + n for n in range(size)] for rank in range(processes)])
    assert sent == [all_reduce(size, processes).sent] * processes
    assert 2 * all_gather(size, processes).sent == all_reduce(size, processes).sent


def test_each_process_holds_a_buffer_and_its_share(model: Any) -> None:
    assert in_one_of(ALONE, model, Launch()) is ALONE
    whole = in_one_of(ALONE, model, Launch(8)).phases["forward"]
    assert whole == {"weights": 10_400, "controls": 40, "buffer": 40}
    shared = in_one_of(ALONE, model, Launch(8, "fsdp2")).phases["forward"]
    assert shared == whole | {"weights": 400 + 10_000 // 8 + 3 * 1_000}


def test_what_each_process_sends(model: Any) -> None:
    assert traffic_of(ALONE, model, 3, Launch(4)) == all_reduce(40, 4)
    shared = traffic_of(ALONE, model, 3, Launch(4, "fsdp2"))
    gathered = 2 * LAYERS * 3  # each layer twice in each of 3 micro-batches
    assert shared.sent == 60 + gathered * 750
    assert shared.calls == 1 + gathered
    assert shared.seconds(Link("a", 1e3, 0.5)) == pytest.approx(
        0.5 * shared.calls + shared.sent / 750
    )


def test_a_joint_vote_sends_what_a_site_joins() -> None:
    changes = ["launch.num_processes=4", "train.gradient_accumulation_steps=3"]
    for sync, mode, passes in (("false", "none", 0), ("true", "none", 2), ("true", "full", 3)):
        more = [f"method.routing.sync={sync}", f"train.activation_checkpointing={mode}"]
        own = load_recipe("quickstart", [*changes, *more])
        sent = votes_of(own, build.base_shape(own), launch_of(own))
        assert sent.calls == 3 * passes * 8  # sites, each with the 8 controls of the shared pool
        assert sent.sent == sent.calls * 4 * (2 * 8 + 1) * 3 // 2


def test_a_plan_of_several_processes() -> None:
    planner, changes = Planner(None, Rows(None)), ["train.gradient_accumulation_steps=3"]
    alone = planner.plan(load_recipe("quickstart", changes))
    joint = planner.plan(load_recipe("quickstart", [*changes, "launch.num_processes=4"]))
    assert (alone.processes, alone.strategy) == (1, None)
    assert (alone.wire_bytes, alone.wire_seconds) == (0, {})
    assert (joint.processes, joint.strategy) == (4, "ddp")
    assert joint.wire_seconds.keys() == {link.name for link in LINKS}
    assert joint.parts["buffer"] == joint.step_bytes - alone.step_bytes
    assert joint.parts["buffer"] == pytest.approx(joint.parts["controls"], rel=0.1)
    assert joint.wire_bytes == 3 / 2 * joint.parts["buffer"]


def test_the_command_plans_for_processes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "alternatives_to", lambda recipe: [])
    assert run(["plan", "quickstart", "--gpu", "T4", "--processes", "4", "--json"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert (plan["processes"], plan["strategy"]) == (4, "ddp")
    assert (
        run(["plan", "quickstart", "--gpu", "T4", "--processes", "4", "--strategy", "fsdp2"]) == 0
    )
    told = capsys.readouterr()
    assert "each of 4 processes (fsdp2) sends" in told.out
    assert "--set launch.num_processes=4 --set launch.strategy=fsdp2" in told.err


def test_options_are_keys_of_the_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "quickstart", "--processes", "0", "--strategy", "fsdp"]) == 2
    told = capsys.readouterr().err
    assert "launch.num_processes" in told
    assert "did you mean 'fsdp2'" in told


def test_a_training_that_runs_is_planned_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    own = load_recipe("quickstart", ["launch.num_processes=2", "launch.strategy=fsdp2"])
    assert launch_of(own) == Launch(2, "fsdp2")
    monkeypatch.setattr(shared, "current", lambda: Processes(world=3))
    assert launch_of(own) == Launch(3, "fsdp2")
