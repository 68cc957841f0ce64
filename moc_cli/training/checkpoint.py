"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a wrong resume.

    checkpoints/step-000100/trainables.safetensors   controls, gates and new modules
                            optimizer.safetensors    AdamW's moments and step, by parameter name
                            rng.safetensors          torch, Python and NumPy
                            state.json               counters, the recipe, a hash of each file

No pickle, no base weights. A folder has its name only when all of it is on the disk.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load, save
from torch import Tensor

from moc_cli.errors import FileError, RunError
from moc_cli.files import (
    TEMPORARY,
    clear_leftovers,
    to_plain,
    unused_name,
    write_folder_atomic,
)
from moc_cli.run_files import Shape, read_bytes, read_object

FORMAT = 1
STATE = "state.json"
PARTS = ("trainables", "optimizer", "rng")
ASIDE = "set-aside"


@dataclass
class Counters:
    """Where the run is. Between two steps, this and the tensors are all that the future needs."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs completed
    batch: int = 0  # micro-batches taken from the epoch that runs
    tokens: int = 0  # real tokens seen
    positions: int = 0  # the same with padding
    examples: int = 0
    loss_sum: float = 0.0  # of the steps since the last log line
    loss_steps: int = 0
    evaluated_step: int = 0
    best_value: float | None = None
    best_step: int | None = None
    bad_evaluations: int = 0  # since the best one
    log_lines: int = 0  # lines of metrics.jsonl
    seconds: float = 0.0  # spent in training steps
    choices: list[list[int]] | None = None  # of each site, since the last log line


class State(Shape):
    """state.json of a checkpoint."""

    format: int
    counters: Counters
    identity: dict[str, Any]
    files: dict[str, str]
    digest: str


@dataclass(frozen=True)
class Snapshot:
    """One checkpoint in memory; `identity` says which run it belongs to."""

    counters: Counters
    trainables: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    identity: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Write `snapshot` as the folder `path`, all of it or nothing.

    Raises FileError when the disk refuses; what was there before is untouched then.
    """
    hashes = {}
    with write_folder_atomic(path) as folder:
        for part in PARTS:
            payload = save(getattr(snapshot, part))
            (folder / f"{part}.safetensors").write_bytes(payload)
            hashes[f"{part}.safetensors"] = hashlib.sha256(payload).hexdigest()
        state = {
            "format": FORMAT,
            "counters": to_plain(snapshot.counters),
            "identity": to_plain(snapshot.identity),
            "files": hashes,
        }
        state["digest"] = digest_of(state)
        (folder / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")


def read_checkpoint(path: Path) -> Snapshot:
    """Return the checkpoint at `path` after checking every hash.

    Raises RunError naming the checkpoint and what is wrong with it.
    """
    state = read_state(path)
    tensors = {}
    for part in PARTS:
        name = f"{part}.safetensors"
        payload = read_bytes(path / name, largest=None)
        if hashlib.sha256(payload).hexdigest() != state["files"].get(name):
            raise RunError(f"checkpoint {path} is damaged: {name} does not match its hash")
        try:
            tensors[part] = load(payload)
        except safetensors.SafetensorError as error:
            raise RunError(f"checkpoint {path} is damaged: {name}: {error}") from error
    fields = {f.name for f in dataclasses.fields(Counters)}
    counters = {key: value for key, value in state["counters"].items() if key in fields}
    return Snapshot(counters=Counters(**counters), identity=state["identity"], **tensors)


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json of the checkpoint at `path`, its own digest checked.

    Raises RunError when it is missing, damaged or of another format.
    """
    if not os.path.lexists(path / STATE):
        raise RunError(
            f"{path} is not a checkpoint: it holds no {STATE}",
            "give a folder like RUN/checkpoints/step-000100, or --resume auto",
        )
    try:
        state = read_object(path / STATE, State)
    except RunError as error:
        raise RunError(f"checkpoint {path} is damaged: {error.message}") from error
    digest = state.pop("digest")
    if digest != digest_of(state):
        raise RunError(f"checkpoint {path} is damaged: {STATE} does not match its hash")
    if state["format"] != FORMAT:
        raise RunError(
            f"checkpoint {path} has format {state['format']}; this version reads {FORMAT}"
        )
    return state


class Checkpoints:
    """The folder `checkpoints/` of one run: save, find the newest that is whole, prune."""

    def __init__(self, root: Path, limit: int | None = None) -> None:
        self.root = root
        self.limit = limit

    def path(self, step: int) -> Path:
        """Return where the checkpoint of `step` lies."""
        return self.root / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first."""
        if not self.root.is_dir():
            return []
        names = (path.name for path in self.root.iterdir() if path.is_dir())
        numbers = (re.fullmatch(r"step-([0-9]{6,18})", name) for name in names)
        return sorted(int(number[1]) for number in numbers if number)

    def save(self, snapshot: Snapshot) -> Path:
        """Write the checkpoint of the snapshot's step, then drop those beyond the limit."""
        path = self.path(snapshot.counters.step)
        write_checkpoint(path, snapshot)
        self.prune(best=snapshot.counters.best_step)
        return path

    def prune(self, best: int | None) -> None:
        """Keep the newest `limit`, counting the best one among them; best and last always stay."""
        if self.limit is None:
            return
        steps = self.steps()
        keep = {steps[-1], best} & set(steps)
        for step in reversed(steps):
            if len(keep) < self.limit:
                keep.add(step)
        for step in steps:
            if step not in keep:
                self._remove(self.path(step))

    def newest(self, say: Callable[[str], None]) -> tuple[Path, Snapshot] | None:
        """Return the newest whole checkpoint, or None where there is none at all.

        Each damaged one is passed over with a sentence to `say`. Raises RunError when all are.
        """
        if self.root.is_dir():
            clear_leftovers(self.root)
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.path(step), read_checkpoint(self.path(step))
            except RunError as error:
                say(f"{error.message}; trying the one before")
        if steps:
            raise RunError(
                f"none of the {len(steps)} checkpoints in {self.root} is whole",
                "start again with --overwrite",
            )
        return None

    def set_aside_after(self, step: int) -> list[Path]:
        """Move checkpoints later than `step` out of the way, so that none is taken up by mistake.

        Returns where they went.
        """
        moved = []
        for later in (number for number in self.steps() if number > step):
            target = self.root / ASIDE / self.path(later).name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(target, ignore_errors=True)
                os.rename(self.path(later), target)
            except OSError as error:
                raise FileError(f"cannot move {self.path(later)}: {error.strerror}") from error
            moved.append(target)
        return moved

    def _remove(self, path: Path) -> None:
        """Drop a checkpoint; its name goes first, so that a half-deleted one is never found."""
        doomed = unused_name(TEMPORARY, path)
        with contextlib.suppress(OSError):  # the next save tries again
            os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def digest_of(state: dict[str, Any]) -> str:
    """Return the hash of everything in `state` but its digest."""
    content = {key: value for key, value in state.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
