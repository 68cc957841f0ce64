"""Each way of starting several processes trains once, the same, and is told by one of them."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from support.group import as_launched, free_port
from support.launched import Command, Said

RECIPE = """
model: {model_name_or_path: builtin:world-llama}
method: {name: moc, rank: 4, gate: {projection_dim: 8}}
data: {suite: builtin, tasks: [world], max_train_samples: 32, max_length: 64}
train: {max_steps: 4, per_device_train_batch_size: 2}
eval: {before: false, max_samples: 4}
output: {output_dir: run, save_steps: 2, logging_steps: 1}
launch: {device: cpu, num_threads: 1, ddp_timeout: 60}
"""


def torchrun(rank: int, port: int) -> dict[str, str]:
    return as_launched(rank, 2, port)


def mpirun(rank: int, port: int) -> dict[str, str]:
    own = {"SIZE": 2, "RANK": rank, "LOCAL_SIZE": 2, "LOCAL_RANK": rank}
    return {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in own.items()} | {
        "MASTER_PORT": str(port)
    }


def srun(rank: int, port: int) -> dict[str, str]:
    own = {"STEP_NUM_TASKS": 2, "STEP_NUM_NODES": 1, "PROCID": rank, "LOCALID": rank}
    return {f"SLURM_{name}": str(value) for name, value in own.items()} | {"MASTER_PORT": str(port)}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


def together(way: Callable[[int, int], dict], name: str, *arguments: str) -> list[Said]:
    port = free_port()
    commands = [
        Command(["train", "recipe.yaml", *arguments], Path(f"{name}-{rank}"), way(rank, port))
        for rank in (0, 1)
    ]
    return [command.wait() for command in commands]


def weights(run: Path) -> bytes:
    return (run / "controls" / "adapter_model.safetensors").read_bytes()


def test_every_way_trains_the_same_run(recipe: Path) -> None:
    """What `moc` starts itself are new processes; here a launcher's variables make the others."""
    both = ["train", "recipe.yaml", "--json", "--set", "launch.num_processes=2"]
    started = Command(both, Path("moc"), new=True).wait()
    assert (started.code, json.loads(started.out)["status"]) == (0, "finished")
    first = "launch  2 processes (--set launch.num_processes), 4 rows a step (2 x 2 x 1); only one"
    assert started.err.startswith(first)
    steps = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [line["examples"] for line in steps] == [4, 8, 12, 16]
    for way in (torchrun, mpirun, srun):
        folder = f"run-{way.__name__}"
        one, other = together(way, way.__name__, "--json", "--output-dir", folder)
        assert (one.code, other.code, other.out, other.err) == (0, 0, "", "")
        assert json.loads(one.out)["status"] == "finished"
        assert f"launch  2 processes ({way.__name__}" in one.err
        assert weights(Path(folder)) == weights(Path("run"))


def test_a_mistake_that_all_make_is_told_once(recipe: Path) -> None:
    one, other = together(torchrun, "once", "--set", "train.max_steps=0", "--json")
    assert (one.code, other.code, other.out, other.err) == (2, 2, "", "")
    assert "train.max_steps" in json.loads(one.out)["error"]


def test_a_signal_and_a_kill_end_all_and_the_run_goes_on(recipe: Path) -> None:
    """SIGINT to the `moc` that has started both, then SIGKILL to one of them."""
    long = ["train", "recipe.yaml", "--set", "train.max_steps=400"]
    both = [*long, "--set", "launch.num_processes=2"]
    moc = Command(both, Path("stopped"))
    wait_for_steps(moc, 2)
    psutil.Process(moc.process.pid).send_signal(signal.SIGINT)
    said = moc.wait()
    assert said.code == 130
    assert said.err.count("stopped after step") == said.err.count("stopping after this step") == 1
    moc = Command([*both, "--resume", "auto", "--json"], Path("killed"))
    wait_for_steps(moc, len(lines()) + 2)
    children = psutil.Process(moc.process.pid).children()
    max(children, key=lambda child: child.pid).kill()  # process 1, which was started last
    said = moc.wait()
    assert (said.code, not psutil.wait_procs(children, 10)[1]) == (137, True)
    error = json.loads(said.out)
    assert "process 1 on " in error["error"]
    assert " was ended by SIGKILL after step " in error["error"]
    assert error["hint"].endswith("--resume auto")
    assert "Traceback" not in said.err
    alone = [*long[:2], "--set", "train.gradient_accumulation_steps=2"]
    step = lines()[-1]["step"]
    more = ["--resume", "auto", "--set", f"train.max_steps={step + 1}"]
    assert Command([*alone, *more], Path("resumed")).wait().code == 0
    assert [line["step"] for line in lines()] == list(range(1, step + 2))


def lines() -> list[dict]:
    path = Path("run/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_steps(moc: Command, count: int) -> None:
    end = time.monotonic() + 120
    while len(lines()) < count:
        assert moc.process.is_alive(), moc.wait()
        assert time.monotonic() < end, moc.wait()
        time.sleep(0.02)
