"""Kill one of two processes that train together, or the `moc` that has started them, and resume.

    python tests/support/kill_together.py --trials 12 [--folder DIR] [--seed 0]

As kill_trials.py, whose recipe is trained here by two processes: each trial starts `moc train`,
which starts both, and sends SIGKILL to one of the three at a moment drawn from the time that the
untouched run took. The others must be gone soon, and the exit code must say what happened. Then
`--resume auto` goes on in two processes, and everything that is not a measurement must be equal to
the untouched run; or in one, with as many rows a step, and the controls must be equal to rounding.
What one process goes on with has neither gate nor dropout: a choice may hang on the last bit of a
sum, and one process draws its dropout in another order.
"""

import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import psutil
from safetensors.torch import load_file
from support.kill_trials import (
    differences,
    fingerprint,
    finish,
    make_model,
    read_options,
    start,
    wait_for,
    write_recipe,
)

TOGETHER = ("--set", "launch.num_processes=2")
ALONE = ("--set", "launch.num_processes=1", "--set", "train.gradient_accumulation_steps=4")
WITHOUT_GATE = ("--set", "method=control", "--set", "method.rank=4")
ROUNDING = 1e-4  # of a control's weight, after AdamW has divided small gradients by each other
SOON = 30.0  # seconds
VICTIMS = ("process 0", "process 1", "moc")
EXITS = {"process 0": 137, "process 1": 137, "moc": -signal.SIGKILL}


class Trial(NamedTuple):
    """One kill: whether it came in time, the step to go on from, and what then was wrong."""

    hit: bool
    step: int
    wrong: list[str]


def workers(moc: BaseProcess) -> dict[str, psutil.Process]:
    """The processes that `moc` has started, by name."""
    children = psutil.Process(moc.pid).children()
    return {f"process {child.environ()['RANK']}": child for child in children}


def untouched(folder: Path, model: Path, steps: int, *method: str) -> float:
    """Train to the end without a kill; return the seconds that it could be hit in."""
    moc = start(write_recipe(folder, model, steps), *TOGETHER, *method)
    wait_for(folder / "recipe.yaml", lambda: not moc.is_alive())
    opened = time.monotonic()
    moc.join()
    if moc.exitcode != 0:
        raise RuntimeError(folder.with_suffix(".log").read_text()[-3000:])
    return time.monotonic() - opened


def kill_and_resume(
    folder: Path, reference: Path, model: Path, steps: int, seconds: float, victim: str, alone: bool
) -> Trial:
    """Kill `victim` so many seconds after the run opened its folder, resume, and compare."""
    recipe = write_recipe(folder, model, steps)
    method = WITHOUT_GATE if alone else ()
    moc = start(recipe, *TOGETHER, *method)
    wait_for(folder / "recipe.yaml", lambda: not moc.is_alive())
    started = workers(moc)
    time.sleep(seconds)
    if not moc.is_alive():
        return Trial(False, steps, [])
    psutil.Process(moc.pid if victim == "moc" else started[victim].pid).kill()
    moc.join(SOON)
    _, left = psutil.wait_procs(list(started.values()), SOON)
    wrong = ["processes are left"] if left or moc.is_alive() else []
    if moc.exitcode == 0:
        return Trial(False, steps, wrong)
    if moc.exitcode != EXITS[victim]:
        wrong.append(f"exit code {moc.exitcode}")
    if victim != "moc" and f"{victim} on" not in (log := recipe.with_suffix(".log").read_text()):
        wrong.append(f"not told: {log[-300:]}")
    if "Traceback" in recipe.with_suffix(".log").read_text():
        wrong.append("a traceback")
    saved = [int(path.name.removeprefix("step-")) for path in folder.glob("checkpoints/step-*")]
    finish(recipe, "--resume", "auto", *(ALONE if alone else TOGETHER), *method)
    if alone:
        far = distance(reference, folder)
        wrong += [f"controls differ by {far:.1e}"] if far > ROUNDING else []
    else:
        wrong += differences(fingerprint(reference), fingerprint(folder))
    return Trial(True, max(saved, default=0), wrong)


def distance(run: Path, other: Path) -> float:
    """Return the largest difference of a weight between the controls of two runs."""
    one, two = (load_file(path / "controls" / "adapter_model.safetensors") for path in (run, other))
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def main() -> int:
    """Run the trials, print a line for each, and return 1 if any is wrong."""
    options = read_options(__doc__, trials=12)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = make_model(folder / "model"), make_model(folder / "without-dropout", dropout=0.0)
        references = folder / "untouched", folder / "untouched-control"
        span = min(
            untouched(
                references[alone], models[alone], options.steps, *(WITHOUT_GATE if alone else ())
            )
            for alone in (False, True)
        )
        print(f"untouched: {span:.1f} s to be killed in", flush=True)
        generator = random.Random(options.seed)
        bad = number = hits = 0
        while hits < options.trials:
            victim, alone = VICTIMS[hits % 3], hits % 2 == 1
            seconds = generator.uniform(0, span)
            place = folder / f"trial-{number:03d}"
            trial = kill_and_resume(
                place, references[alone], models[alone], options.steps, seconds, victim, alone
            )
            number += 1
            hits += trial.hit
            bad += bool(trial.wrong)
            verdict = "; ".join(trial.wrong[:4]) or "equal"
            where = "too late" if not trial.hit else f"resumed from step {trial.step}"
            print(
                f"trial {number}: {victim} killed at {seconds:.2f} s, {where} in "
                f"{1 if alone else 2}: {verdict}",
                flush=True,
            )
        print(f"{number} runs, {hits} killed, {number - bad} as they should be")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
