"""The run folder: the only contract between commands.

recipe.yaml                          the recipe, resolved
controls/adapter_config.json         the method, where it sits, the base, a hash of the payload
controls/adapter_model.safetensors   what was trained
checkpoints/step-000100/             what a resume needs
metrics.jsonl                        one line per logged step or evaluation
results.json                         scores before and after, time, memory, routing
environment.json                     versions, device, data and base model, with hashes
trained_rows.txt                     a hash of each row that was trained on
"""

import contextlib
import os
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moc_cli.adapter.folder import write_adapter
from moc_cli.errors import MocError, RunError
from moc_cli.files import (
    LOCK,
    check_folder,
    clear_leftovers,
    disk_errors,
    is_leftover,
    lock,
    remove,
    write_folder_atomic,
    write_json_atomic,
    write_text_atomic,
)
from moc_cli.report.output import say
from moc_cli.run_files import (
    Environment,
    MetricsLine,
    read_base_tensors,
    read_bytes,
    read_evaluation,
    read_lines,
    read_object,
    read_training,
)

if TYPE_CHECKING:
    from moc_cli.recipe.schema import Recipe

TRAINED_ROWS = "trained_rows.txt"
VOCABULARY = "vocabulary_sha256"
# In the order in which an overwrite deletes them: what marks a run folder goes last.
ENTRIES = (
    *("results.json", "controls", "checkpoints", "metrics.jsonl", "environment.json"),
    TRAINED_ROWS,
    *("eval", "routing", "trackers", "recipe.yaml", LOCK),
)


@dataclass(frozen=True)
class Call:
    """How a command was called, for hints that can be pasted; `base` is without the run folder."""

    base: str
    output_dir: str | None = None

    @property
    def command(self) -> str:
        """The whole call again."""
        if self.output_dir is None:
            return self.base
        return f"{self.base} --output-dir {shlex.quote(self.output_dir)}"


@dataclass(frozen=True)
class BaseOptions:
    """Where a run's base model is now, if it moved, and whether weights outside of its layers may
    differ from those of the training.

    `load_in_4bit` keeps its linear weights in 4 bits, or unquantised; None: as in training.
    """

    path: str | Path | None = None
    allow_changes: bool = False
    load_in_4bit: bool | None = None


class RunFolder:
    """Paths of one run, and the reading and writing of its small files.

    As a context manager it releases its lock at the end; a killed process releases it too.
    """

    def __init__(self, path: str | Path, checkpoint: Path | None = None) -> None:
        self.path = Path(path)
        self.checkpoint = checkpoint  # whose controls are meant, where not those of the end
        self.recipe_file = self.path / "recipe.yaml"
        self.controls = self.path / "controls"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.trackers = self.path / "trackers"  # where TensorBoard and others write
        self._lock: int | None = None

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """Return the existing run at `path`, or the run of the checkpoint at `path`.

        A run that was interrupted before its end stands for its newest checkpoint, also where it
        was finished before and then continued. Raises RunError where there is no run, and where its
        results.json is damaged.
        """
        run, inside = cls(path), Path(path)
        if inside.parent.name == "checkpoints" and not run.recipe_file.is_file():
            run = cls(inside.parent.parent, inside)
        if not run.recipe_file.is_file():
            raise RunError(
                f"{run.path} is not a run folder: it holds no recipe.yaml",
                "give the folder that `moc train` wrote (output.output_dir)",
            )
        saved = run._saved_checkpoints()
        if run.checkpoint is None and saved and not run._has_ended():
            run.checkpoint = saved[-1]
        if run.checkpoint is not None and not run.checkpoint.is_dir():
            names = ", ".join(path.name for path in saved) or "none"
            raise RunError(f"{run.path} has no checkpoint {run.checkpoint.name}; it has {names}")
        return run

    def _saved_checkpoints(self) -> list[Path]:
        """Return the folders of the checkpoints, oldest first."""
        steps = {path: path.name.removeprefix("step-") for path in self.checkpoints.glob("step-*")}
        return sorted((p for p in steps if steps[p].isdecimal()), key=lambda p: int(steps[p]))

    def _has_ended(self) -> bool:
        """Whether the controls are those of the training's end: results.json names them then."""
        if not all(map(os.path.lexists, (self.controls, self.path / "results.json"))):
            return False
        results = self.read_results()
        return results.get("status") == "finished" or "controls" in results

    @property
    def name(self) -> str:
        """The folder of what is meant: the run, or one of its checkpoints."""
        return str(self.checkpoint or self.path)

    def labelled(self, label: str) -> str:
        """Return a name of results; those of a checkpoint stand apart from those of the end."""
        return f"{label}-{self.checkpoint.name}" if self.checkpoint else label

    def read_recipe(self, *, trust_remote_code: bool) -> "Recipe":
        """Return the run's recipe.

        Raises RecipeError where it is damaged, or wants the code of a model's folder to run, and
        the user has not said `trust_remote_code` in this call.
        """
        from moc_cli.recipe.load import check_trust, load_recipe

        recipe = load_recipe(self.recipe_file)
        check_trust(recipe, self.recipe_file, granted=trust_remote_code)
        return recipe

    @classmethod
    def claim(cls, path: str | Path, *, call: Call, resume: bool, overwrite: bool) -> "RunFolder":
        """Return the folder for a training run, locked if it exists; nothing is written yet.

        `call` is how the user called, for the commands in a refusal. Raises RunError
        when the folder is in use, holds anything and neither `resume` nor `overwrite` was asked
        for, or holds files that no run made.
        """
        run = cls(path)
        if os.path.isfile(run.path):
            raise RunError(f"{run.path} is a file; output.output_dir must be a folder")
        check_folder(run.path)
        if run.path.is_dir():
            if not os.path.lexists(run.path / LOCK):
                run._check(call, resume, overwrite)  # nothing is made in a folder that is refused
            run._acquire()
            try:
                run._check(call, resume, overwrite)
                run._sign()
            except MocError:
                run.release()
                raise
        return run

    def begin(self, recipe_text: str, *, fresh: bool) -> None:
        """Make the folder, drop an earlier run if `fresh`, and write the recipe.

        Raises RunError when another process was quicker; FileError when the disk refuses.
        """
        if self._lock is None:
            with disk_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            self._acquire()
            if self.content():
                self.release()
                raise RunError(f"{self.path} was taken by another run in the meantime")
            self._sign()
        with disk_errors(self.path):
            clear_leftovers(self.path)
            for name in ENTRIES if fresh else ():
                if name != LOCK:
                    remove(self.path / name)
        write_text_atomic(self.recipe_file, recipe_text)

    def release(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    # The small files

    def save_controls(self, config: dict[str, Any], payload: bytes) -> None:
        """Write the controls' two files, both or neither; the config gets their hashes."""
        with write_folder_atomic(self.controls) as folder:
            write_adapter(folder, config, payload)

    def write_results(self, results: dict[str, Any]) -> None:
        """Write results.json."""
        write_json_atomic(self.path / "results.json", results)

    def read_results(self) -> dict[str, Any]:
        """Return results.json in format 2; raises RunError where it is missing or damaged."""
        return read_training(self.path / "results.json")

    def read_evaluations(self) -> dict[str, dict[str, Any]]:
        """Return what `moc eval` has written into the run, in format 2, by the folders' names.

        Raises RunError where one of them is damaged.
        """
        files = sorted((self.path / "eval").glob("*/results.json"))
        return {file.parent.name: read_evaluation(file) for file in files}

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Write environment.json."""
        write_json_atomic(self.path / "environment.json", environment)

    def read_history(self) -> list[dict[str, Any]]:
        """Return when the run was started and resumed, oldest first; RunError as below."""
        return list(self.read_environment().get("history", []))

    def read_scores_before(self) -> dict[str, dict[str, float]]:
        """Return the untrained model's scores, task -> metric -> value, where they are known.

        Raises RunError where results.json is missing or damaged.
        """
        results = self.read_results()
        before = results.get("before", {})  # until the task is scored after training
        if results.get("status") == "finished":
            before = before | {
                task: {name: score.get("before") for name, score in entry["metrics"].items()}
                for task, entry in results["tasks"].items()
            }
        known_scores = {
            task: {name: value for name, value in values.items() if value is not None}
            for task, values in before.items()
        }
        return {task: values for task, values in known_scores.items() if values}

    def read_environment(self) -> dict[str, Any]:
        """Return environment.json; raises RunError where it is missing or damaged."""
        return read_object(self.path / "environment.json", Environment)

    def write_trained_rows(self, hashes: Iterable[str]) -> None:
        """Write trained_rows.txt, a line for each different row."""
        write_text_atomic(self.path / TRAINED_ROWS, "\n".join(sorted(set(hashes))) + "\n")

    def read_trained_rows(self) -> set[str]:
        """Return the hashes in trained_rows.txt; an older run has none."""
        path = self.path / TRAINED_ROWS
        return set(read_bytes(path).decode("ascii", "replace").split()) if path.is_file() else set()

    def base_tensors(self) -> dict[str, str]:
        """Return the base's tensors as training found them; {} where the run does not say it."""
        return read_base_tensors(self.path / "environment.json")

    def base_vocabulary(self) -> str | None:
        """Return the hash of the tokenizer's vocabulary; None where the run does not say it."""
        with contextlib.suppress(RunError):
            vocabulary_hash: str | None = (
                self.read_environment().get("tokenizer", {}).get(VOCABULARY)
            )
            return vocabulary_hash
        return None

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the complete lines of metrics.jsonl; a last line cut by a kill is left out.

        Raises RunError for any other line that cannot be read.
        """
        return read_lines(self.metrics, MetricsLine) if os.path.lexists(self.metrics) else []

    # Claiming

    def _check(self, call: Call, resume: bool, overwrite: bool) -> None:
        content = self.content()
        if not content:
            return
        foreign = [name for name in content if name not in ENTRIES]
        if not self.recipe_file.is_file() or (overwrite and foreign):
            reason = f"holds {', '.join(foreign[:5])}" if foreign else "holds no recipe.yaml"
            raise RunError(
                f"{self.path} is left unchanged: it {reason}, so it is more than a run folder",
                f"look into it, or choose another folder: {call.base} --output-dir OTHER",
            )
        if resume or overwrite:
            return
        ways = [f"{call.command} --resume auto   # continue that run"]
        if not foreign:
            ways.append(f"{call.command} --overwrite   # replace it")
        ways.append(f"{call.base} --output-dir OTHER   # leave it alone")
        raise RunError(f"{self.path} is not empty", "\n      ".join(ways))

    def content(self) -> list[str]:
        """Return the names in the folder, but for the lock and what killed processes left."""
        if not self.path.is_dir():
            return []
        names = sorted(path.name for path in self.path.iterdir())
        return [name for name in names if name != LOCK and not is_leftover(name)]

    def _acquire(self) -> None:
        self._lock = lock(self.path, say=say)
        if self._lock is None:
            try:
                owner = Path(self.path, LOCK).read_bytes()[:32].decode(errors="replace").strip()
            except OSError:
                owner = ""
            raise RunError(
                f"{self.path} is in use by another process ({owner or 'unknown'})",
                "wait for it, or choose another folder with --output-dir",
            )

    def _sign(self) -> None:
        """Write into the lock who has it; only once the folder is accepted as a run's."""
        assert self._lock is not None
        with disk_errors(self.path / LOCK):
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"process {os.getpid()}".encode(), 0)
