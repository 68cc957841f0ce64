"""How runs share the machine, and how a stop ends those at work."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO, Any

import pytest
from support.messages import refused

from moc_cli.recipe.sweep import Sweep, setting_of
from moc_cli.signals import EndedBySignal
from moc_cli.sweep import execute
from moc_cli.sweep.plan import make_plan

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def execution(folder: Path, jobs: int, gpus: int, **keys: Any) -> execute.Execution:
    values = [setting_of("method.top_k", k) for k in (0, 1, 3)]
    groups = {"method.top_k": values}
    sweep = Sweep("s", "quickstart", groups=groups, output_dir=str(folder), **keys)
    return execute.Execution(make_plan(sweep, []), jobs, gpus, lambda text: None)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[subprocess.Popen[str], dict]]:
    """What a sweep starts: processes that sleep, with the environment of each."""
    begun: list[tuple[subprocess.Popen[str], dict]] = []

    def start(command: list[str], environment: dict, log: IO[str]) -> subprocess.Popen[str]:
        begun.append((subprocess.Popen(SLEEP, text=True), environment))
        return begun[-1][0]

    monkeypatch.setattr(execute, "start", start)
    return begun


@pytest.mark.parametrize(
    ("jobs", "gpus", "listed", "expected"),
    [
        (2, 2, "", [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]),
        (2, 2, "4,6", [{"CUDA_VISIBLE_DEVICES": "4"}, {"CUDA_VISIBLE_DEVICES": "6"}]),
        (1, 0, "", [{}]),
    ],
)
def test_a_stop_ends_the_runs_at_work_each_on_its_own_gpu(
    jobs: int,
    gpus: int,
    listed: str,
    expected: list[dict],
    tmp_path: Path,
    processes: list[tuple[subprocess.Popen[str], dict]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)

    def interrupt(seconds: float) -> None:
        if len(processes) == jobs:
            raise KeyboardInterrupt

    monkeypatch.setattr(execute.time, "sleep", interrupt)
    with refused(EndedBySignal) as stop:
        execution(tmp_path, jobs, gpus).run_all(lambda done: None, "again")
    assert stop.value.exit_code == 130
    assert [environment for _, environment in processes] == expected
    assert [process.returncode for process, _ in processes] == [-signal.SIGTERM] * jobs


def test_processors_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []

    class Ended:
        def poll(self) -> int:
            return 1

    def start(command: list[str], environment: dict, log: IO[str]) -> Ended:
        seen.append(environment)
        return Ended()

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(execute, "start", start)
    monkeypatch.setattr(execute, "POLL", 0.0)
    monkeypatch.setattr(execute.os, "cpu_count", lambda: 8)
    execution(tmp_path, jobs=2, gpus=0).run_all(lambda done: None, "again")
    assert seen == [{"OMP_NUM_THREADS": "4"}] * 3


def test_a_run_stops_when_its_sweep_is_killed(tmp_path: Path) -> None:
    """A program starts a `moc` as a sweep does, and is killed; the `moc` is asked to stop."""
    run = (
        "import sys, time; from moc_cli.cli import run; from moc_cli.recipe import catalog;"
        "catalog.entries = lambda: (print('begun', flush=True), time.sleep(60));"
        "sys.exit(run(['recipes', 'list']))"
    )
    log = tmp_path / "log"
    program = (
        "import sys, time; from moc_cli.sweep.execute import start;"
        "start([sys.executable, '-c', sys.argv[1]], {}, open(sys.argv[2], 'w')); time.sleep(60)"
    )
    sweep = subprocess.Popen([sys.executable, "-c", program, run, str(log)])
    wait_for(log, "begun")
    sweep.kill()
    sweep.wait()
    wait_for(log, "stopped by signal 15")


def wait_for(log: Path, word: str) -> None:
    end = time.monotonic() + 60
    while not log.is_file() or word not in log.read_text():
        assert time.monotonic() < end, f"no '{word}'"
        time.sleep(0.02)
