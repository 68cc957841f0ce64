"""Training the runs of a sweep: each is a `moc train` of its own, several side by side."""

import gzip
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from moc_cli.comparison.runs import PACKED
from moc_cli.errors import MocError
from moc_cli.files import lock_file, write_bytes_atomic, write_json_atomic, write_text_atomic
from moc_cli.processes import PARENT
from moc_cli.recipe.load import dump
from moc_cli.recipe.sweep import Sweep
from moc_cli.results import main_score
from moc_cli.run_files import Sample, read_lines
from moc_cli.signals import EndedBySignal, handled, stop_number
from moc_cli.sweep.plan import PlannedRun, SweepPlan
from moc_cli.training.changes import is_finished

POLL = 0.2  # seconds between two looks at the processes
LOOK_AGAIN = 5.0  # and at a run that another sweep trains
# What is kept of an item: what names it, and what a score is made from.
OF_ITEMS = ("task", "row", "prompt", "label", "prediction", "correct", "loss", "tokens")


def start(
    command: list[str], environment: Mapping[str, str], log: IO[str]
) -> "subprocess.Popen[str]":
    """Start a command with changes of the environment; what it prints goes to the log.

    It stops, with a checkpoint, when this process is killed.
    """
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment, PARENT: str(os.getpid())},
        text=True,
    )


@dataclass
class ActiveRun:
    """A run that is at work: its commands in turn, the one that runs now, and its log."""

    run: PlannedRun
    commands: list[list[str]]
    environment: Mapping[str, str]
    slot: int
    log: IO[str]
    process: subprocess.Popen[str] | None = None
    code: int = 0

    def is_done(self) -> bool:
        """Start the next command where one has ended; whether all have, or one has failed."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return False
            self.code = code
        if self.code or not self.commands:
            return True
        self.process = start(self.commands.pop(0), self.environment, self.log)
        return False


@dataclass
class Execution:
    """A sweep at work.

    `elsewhere` holds the runs that another process trains, the same sweep started twice, and when
    each is looked at again.
    """

    plan: SweepPlan
    jobs: int
    gpus: int
    say: Callable[[str], None]
    elsewhere: dict[str, float] = field(default_factory=dict)

    def run_all(self, observe: Callable[[int], None], resume_command: str) -> None:
        """Train what is not finished; `observe` takes the number of finished runs.

        A run that fails is reported, and the others go on. Raises EndedBySignal after a signal,
        when the runs at work have ended; `resume_command` is the command that goes on.
        """
        working: list[ActiveRun] = []
        try:
            while True:
                self._collect(working, observe)
                for run in self._startable(working):
                    self._start(run, working, observe)
                if not working and not self.elsewhere:
                    return
                time.sleep(POLL)
        except KeyboardInterrupt as stop:
            number = stop_number(stop)
            with handled(signal.SIG_IGN, [signal.SIGINT]):  # a second Ctrl-C does not cut this off
                for job in working:
                    if job.process is not None and job.process.poll() is None:
                        job.process.send_signal(signal.SIGTERM)
                for job in working:
                    if job.process is not None:
                        job.process.wait()
            raise EndedBySignal(
                f"stopped; {self.plan.done()} of {self.plan.total()} runs are finished",
                f"continue with: {resume_command}",
                number,
            ) from None

    def _collect(self, working: list[ActiveRun], observe: Callable[[int], None]) -> None:
        for job in [job for job in working if job.is_done()]:
            working.remove(job)
            if not job.code:
                keep_small_files(job.run)
            job.log.close()  # from here on another sweep may have the run
            if job.code:
                self._fail(job.run, _last_words(self._log_file(job.run)))
            else:
                self._finish(job.run, observe)

    def _startable(self, working: list[ActiveRun]) -> Iterator[PlannedRun]:
        if len(working) >= self.jobs:
            return  # the usual case, five times a second: the plan is not looked through
        busy = {job.run.name for job in working}
        now = time.monotonic()
        for run in self.plan.next_runs():
            if len(working) >= self.jobs:
                return
            if run.name not in busy and self.elsewhere.get(run.name, now) <= now:
                yield run

    def _start(
        self, run: PlannedRun, working: list[ActiveRun], observe: Callable[[int], None]
    ) -> None:
        """Start a run, unless another process trains it or has finished it."""
        log = self._open_log(run)
        if log is None:
            if run.name not in self.elsewhere:
                self.say(f"{run.name}: another process trains it")
            self.elsewhere[run.name] = time.monotonic() + LOOK_AGAIN
            return
        self.elsewhere.pop(run.name, None)
        try:
            finished = run.is_finished()
            steps = commands(self.plan.sweep, run)
        except MocError as error:
            log.close()
            self._fail(run, error.message)
            return
        if finished:
            log.close()
            self._finish(run, observe)
            return
        slot = min(set(range(self.jobs)) - {job.slot for job in working})
        working.append(ActiveRun(run, steps, self._share(slot), slot, log))

    def _open_log(self, run: PlannedRun) -> IO[str] | None:
        """Open a run's log, locked until the run has ended; None where another process has it."""
        path = self._log_file(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = lock_file(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, say=self.say)
        return None if descriptor is None else os.fdopen(descriptor, "a", encoding="utf-8")

    def _log_file(self, run: PlannedRun) -> Path:
        return Path(self.plan.sweep.output_dir) / "logs" / (run.name.replace("/", "--") + ".log")

    def _fail(self, run: PlannedRun, reason: str) -> None:
        self.plan.failed[run.name] = reason
        self.say(f"{run.name}: failed: {reason}")

    def _finish(self, run: PlannedRun, observe: Callable[[int], None]) -> None:
        self.plan.finished.add(run.name)
        self.say(f"{run.name}: {_scores(run)}")
        observe(self.plan.done())

    def _share(self, slot: int) -> dict[str, str]:
        """Return the environment that gives a run its own GPU, or its share of the processors."""
        if self.gpus:
            listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            devices = listed.split(",") if listed else [str(index) for index in range(self.gpus)]
            return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
        if self.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs))}


def commands(sweep: Sweep, run: PlannedRun) -> list[list[str]]:
    """Return the commands that a run still needs: `moc train`, and each `moc eval`.

    Raises RunError where its folder holds another run.
    """
    moc, folder = [sys.executable, "-m", "moc_cli"], str(run.folder.path)
    evaluations = dict(zip(run.evaluations, sweep.evaluations, strict=True))
    steps = []
    if is_finished(run.trained, run.folder):
        evaluations = {label: evaluations[label] for label in run.unscored(run.folder)}
    else:
        changes = [part for change in run.changes for part in ("--set", change)]
        resume = ["--resume", "auto"] if run.folder.recipe_file.is_file() else []
        steps.append([*moc, "train", sweep.recipe, *changes, "--output-dir", folder, *resume])
    return [*steps, *([*moc, "eval", folder, *shlex.split(e)] for e in evaluations.values())]


def keep_small_files(run: PlannedRun) -> None:
    """Copy a finished run's recipe, results and evaluations to the folder of results.

    Of metrics.jsonl the lines of the validation rows are kept. The recipe is as the sweep has it,
    so that it names no place of this machine.
    """
    if run.results.path == run.folder.path:
        return
    target = run.results.path
    for label, evaluation in run.folder.read_evaluations().items():
        folder = target / "eval" / label
        folder.mkdir(parents=True, exist_ok=True)
        samples = _slim(run.folder.path / "eval" / label / "samples.jsonl")
        write_bytes_atomic(folder / PACKED, gzip.compress(samples, mtime=0))
        facts = {"run": run.name, "model": run.recipe.model.model_name_or_path}
        facts["samples_sha256"] = hashlib.sha256(samples).hexdigest()
        write_json_atomic(folder / "results.json", evaluation | facts)
    target.mkdir(parents=True, exist_ok=True)
    recipe = run.recipe.changed(output={"output_dir": run.name})
    write_text_atomic(target / "recipe.yaml", dump(recipe))
    validated = [json.dumps(line) for line in run.folder.read_metrics() if "eval" in line]
    write_text_atomic(run.results.metrics, "".join(f"{line}\n" for line in validated))
    write_json_atomic(target / "environment.json", _conditions(run))
    write_json_atomic(target / "results.json", run.folder.read_results())  # last: it is finished


def _slim(samples: Path) -> bytes:
    """Return the lines of samples.jsonl with what an interval is made from alone."""
    lines = []
    for item in read_lines(samples, Sample):
        fields = {key: item[key] for key in OF_ITEMS if key in item}
        lines.append(json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n")
    return "".join(lines).encode()


def _conditions(run: PlannedRun) -> dict[str, Any]:
    """Return what environment.json says of machine, versions, commit, rows and weights."""
    environment = run.folder.read_environment()
    conditions = {
        key: environment[key] for key in ("versions", "platform", "device", "git", "data")
    }
    weights = environment["model"]["weights_sha256"]
    name = run.recipe.model.model_name_or_path
    return conditions | {"model": {"name": name, "weights_sha256": weights}}


def _scores(run: PlannedRun) -> str:
    results = run.results.read_results()
    parts = []
    for task, entry in results["tasks"].items():
        parts.append(f"{task} {entry['metric']} {main_score(entry)['value']:.4f}")
    return f"{', '.join(parts)}, {results['seconds']:.0f} s of training"


def _last_words(log: Path) -> str:
    """Return the line of a log that says what went wrong, or its last one."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    return f"{(errors or lines or ['no word'])[-1].removeprefix('Error: ')} (see {log})"
