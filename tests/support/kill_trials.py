"""Kill `moc train` at random times, resume it, and compare with a run that was left alone.

    PYTHONPATH=tests:. python -m support.kill_trials --trials 20 [--folder DIR] [--seed 0]

Each trial starts the same recipe in a new folder and sends SIGKILL at a moment drawn uniformly from
the time that the untouched run spent between opening its folder and its end: steps, evaluations,
saves. `--resume auto` in a new process then finishes it. Everything that is not a measurement must
be equal: hashes of the controls and of all checkpoints' adapter, optimizer and random states, every
line of metrics, the scores. The model has dropout; steps are of two micro-batches, bucketed by
length, the last one of an epoch of one; a checkpoint is written at every step. Kills that come too
late, because this run was faster, do not count. Every run is a fork of this process, which has
imported what a run imports; tests/cli and tests/launching start the program itself.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from support.tiny_runs import without_measured

import moc_cli
import moc_cli.training.session  # what a run imports: a fork finds it there
from moc_cli.cli import run

RECIPE = """
seed: 7
model: {{model_name_or_path: {model}}}
method: {{name: moc, rank: 4, gate: {{projection_dim: 8}}}}
data: {{suite: builtin, tasks: [world], max_length: 128, max_train_samples: 60,
       max_eval_samples: 8}}
train: {{max_steps: {steps}, per_device_train_batch_size: 4, gradient_accumulation_steps: 2,
        learning_rate: 5.0e-3, warmup_steps: 3, lr_scheduler_type: cosine}}
eval: {{per_device_eval_batch_size: 16, eval_strategy: steps, eval_steps: 7, max_samples: 16,
       before: false}}
output: {{output_dir: {folder}, save_strategy: steps, save_steps: 1, logging_steps: 2}}
launch: {{device: cpu, num_threads: 1}}
"""
PARTS = ("trainables", "optimizer", "rng")


@dataclass(frozen=True)
class Trial:
    """One kill: when, the step to resume from (None: no checkpoint yet), where it hit."""

    seconds: float
    step: int | None
    hit: str
    differences: list[str]


def make_model(folder: Path, dropout: float = 0.1) -> Path:
    """Copy the built-in model and give its attention dropout."""
    source = Path(moc_cli.__file__).parent / "builtin" / "world-llama"
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["attention_dropout"] = dropout
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def start(recipe: Path, *options: str) -> BaseProcess:
    """Start `moc train` in a copy of this process, its notes in a file beside the recipe."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = get_context("fork").Process(target=_train, args=(recipe, options))
    process.start()
    return process


def _train(recipe: Path, options: tuple[str, ...]) -> None:
    """What the new process does."""
    log = os.open(recipe.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.exit(run(["train", str(recipe), *options]))


def write_recipe(folder: Path, model: Path, steps: int) -> Path:
    """Write the trial's recipe, whose run folder is `folder`."""
    path = folder.with_suffix(".yaml")
    path.write_text(RECIPE.format(model=model, folder=folder, steps=steps))
    return path


def finish(recipe: Path, *options: str) -> None:
    """Run to the end; raises RuntimeError with the notes when it fails."""
    process = start(recipe, *options)
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(recipe.with_suffix(".log").read_text()[-3000:])


def wait_for(path: Path, ended: Callable[[], bool]) -> None:
    """Wait until `path` exists; raises RuntimeError when the process ends before."""
    while not path.exists():
        if ended():
            raise RuntimeError(f"the run ended before {path} was there")
        time.sleep(0.002)


def fingerprint(run: Path) -> dict[str, Any]:
    """Return all of a finished run that is no measurement, and hashes of its files."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    results = json.loads((run / "results.json").read_text())
    for name in ("seconds", "memory"):
        del results[name]
    for task in results["tasks"].values():
        del task["seconds"]
    files = [run / "controls" / "adapter_model.safetensors"]
    for checkpoint in sorted((run / "checkpoints").glob("step-*")):
        files += [checkpoint / f"{part}.safetensors" for part in PARTS]
    found: dict[str, Any] = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    found |= {f"metrics line {i}": without_measured(json.loads(x)) for i, x in enumerate(lines)}
    return found | {f"results {name}": value for name, value in results.items()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of what differs."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def untouched(folder: Path, model: Path, steps: int) -> tuple[dict[str, Any], float]:
    """Run to the end without a kill; return its fingerprint and the seconds it could be hit in."""
    recipe = write_recipe(folder, model, steps)
    process = start(recipe)
    wait_for(folder / "recipe.yaml", lambda: not process.is_alive())
    opened = time.monotonic()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(recipe.with_suffix(".log").read_text()[-3000:])
    return fingerprint(folder), time.monotonic() - opened


def kill_and_resume(
    folder: Path, model: Path, steps: int, seconds: float, reference: dict[str, Any]
) -> Trial:
    """Kill a run `seconds` after it opened its folder, resume it, and compare."""
    recipe = write_recipe(folder, model, steps)
    process = start(recipe)
    wait_for(folder / "recipe.yaml", lambda: not process.is_alive())
    time.sleep(seconds)
    process.kill()
    process.join()
    killed = process.exitcode == -signal.SIGKILL
    saved = sorted((folder / "checkpoints").glob("step-*"))
    step = int(saved[-1].name.removeprefix("step-")) if saved else None
    half = list((folder / "checkpoints").glob(".tmp-*")) + list(
        (folder / "checkpoints").glob(".old-*")
    )
    hit = "save" if half else "after the last step" if step == steps else "elsewhere"
    finish(recipe, "--resume", "auto")
    return Trial(
        seconds, step, hit if killed else "too late", differences(reference, fingerprint(folder))
    )


def read_options(description: str | None, trials: int) -> argparse.Namespace:
    """The options of a script of trials."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=trials)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="keep the runs here")
    return parser.parse_args()


def main() -> int:
    """Run the trials, print a line for each, and return 1 if any differs."""
    options = read_options(__doc__, trials=20)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        model = make_model(folder / "model")
        reference, span = untouched(folder / "untouched", model, options.steps)
        print(f"untouched: {len(reference)} things to compare, {span:.1f} s to be killed in")
        generator = random.Random(options.seed)
        bad = number = hits = 0
        while hits < options.trials:
            moment = generator.uniform(0, span)
            place = folder / f"trial-{number:03d}"
            trial = kill_and_resume(place, model, options.steps, moment, reference)
            number += 1
            hits += trial.hit != "too late"
            bad += bool(trial.differences)
            verdict = (
                f"DIFFERS: {', '.join(trial.differences[:4])}" if trial.differences else "equal"
            )
            print(
                f"trial {number}: killed at {trial.seconds:.2f} s ({trial.hit}), "
                f"resumed from step {trial.step}: {verdict}",
                flush=True,
            )
        print(f"{number} runs, {hits} killed, {number - bad} equal the untouched run")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
