"""How many processes are started, and who chose their number."""

import errno
import os
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands import config
from support.messages import refused

from moc_cli.errors import MocError
from moc_cli.launching.plan import make_plan
from moc_cli.recipe.launch import LaunchSection

GPUS = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU"}
CPUS = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "use_cpu": True}


@pytest.fixture(autouse=True)
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where accelerate's configuration file would be."""
    path = tmp_path / "default_config.yaml"
    monkeypatch.setattr(config, "default_config_file", str(path))
    return path


def have_gpus(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("gpus", "launch", "processes", "why"),
    [
        (0, {}, 1, "no GPU"),
        (1, {}, 1, "1 GPU"),
        (8, {}, 8, "8 GPUs"),
        (8, {"device": "cpu"}, 1, "no GPU"),
        (8, {"num_processes": 2}, 2, "launch.num_processes"),
        (0, {"num_processes": 2}, 2, "launch.num_processes"),
        (4, {"num_machines": 2, "main_process_ip": "a"}, 8, "4 GPUs on each of 2 machines"),
    ],
)
def test_the_number_of_processes(
    gpus: int, launch: dict, processes: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_gpus(gpus, monkeypatch)
    plan = make_plan(LaunchSection(**launch))
    assert (plan.processes, plan.why) == (processes, why)
    assert plan.local_processes == processes // launch.get("num_machines", 1)


def test_accelerates_configuration_is_respected(
    configured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_gpus(8, monkeypatch)
    place = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1"}
    values = GPUS | place | {"num_processes": 4, "main_process_port": 29511, "gpu_ids": "0,3"}
    configured.write_text(yaml.safe_dump(values))
    plan = make_plan(LaunchSection())
    assert (plan.processes, plan.machines, plan.rank, plan.local_processes) == (4, 2, 1, 2)
    assert (plan.ip, plan.port, plan.gpu_ids, plan.why) == (
        "10.0.0.1",
        29511,
        "0,3",
        str(configured),
    )
    assert make_plan(LaunchSection(num_processes=1)).processes == 1
    assert make_plan(LaunchSection(device="cpu")).processes == 1


def test_a_configuration_for_the_cpu_counts_there(
    configured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_gpus(0, monkeypatch)
    configured.write_text(yaml.safe_dump(CPUS | {"num_processes": 2}))
    assert make_plan(LaunchSection()).processes == 2
    configured.write_text("num_processes: 2\n")
    with refused(MocError, reason="(?<=processes: ).*"):
        make_plan(LaunchSection())


@pytest.mark.parametrize(
    "content",
    [b"num_processes: [2\n", b"\xff\xfe", b"- 2\n", None],
    ids=["broken", "no text", "a list", "not readable"],
)
def test_a_configuration_that_cannot_be_read_is_told(
    content: bytes | None, configured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_gpus(0, monkeypatch)
    configured.write_bytes(content or b"")
    if content is None:

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(configured))

        monkeypatch.setattr(config, "load_config_from_file", refuse)
    with refused(MocError, reason="(?<=processes: ).*"):
        make_plan(LaunchSection())
    assert make_plan(LaunchSection(num_processes=2)).processes == 2


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    have_gpus(2, monkeypatch)
    with refused(MocError):
        make_plan(LaunchSection(num_processes=4))
    with refused(MocError):  # `moc eval` has no --set
        make_plan(LaunchSection(num_processes=4), "--num-processes ")


def test_a_command_without_set_is_told_its_own_option(
    configured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have_gpus(0, monkeypatch)
    configured.write_text("num_processes: 2\n")
    with refused(MocError, reason="(?<=processes: ).*"):
        make_plan(LaunchSection(), "--num-processes ")
