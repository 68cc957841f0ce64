"""The options of `moc eval`, and the checks of them that need no run."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moc_cli.data.custom.rows import same_place
from moc_cli.data.custom.table import suffix_of
from moc_cli.errors import MocError
from moc_cli.recipe.paths import absolute_path
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.suggest import choices
from moc_cli.recipe.tasks import CHOICE
from moc_cli.runs import BaseOptions

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class EvalOptions:
    """The options as they were typed; None where nothing was. Either `run` or `model` is given.

    `harness`, `tasks_path` and `num_fewshot` are for tasks of lm-evaluation-harness.
    """

    run: Path | None = None
    model: str | None = None
    tasks: tuple[str, ...] = ()
    suite: str | None = None
    path: str | None = None
    protocol: str | None = None
    limit: int | None = None
    batch_size: str | None = None
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    base_options: BaseOptions = BaseOptions()
    torch_compile: bool | None = None
    base: bool = False
    output_dir: Path | None = None
    harness: tuple[str, ...] | None = None
    tasks_path: Path | None = None
    num_fewshot: int | None = None

    def label(self, protocol: str, data: DataSection | None = None) -> str:
        """Name the folder of results by its conditions; `protocol` and `data` are the recipe's."""
        name = self.protocol or protocol
        if self.harness is not None:
            shots = "" if self.num_fewshot is None else f"-{self.num_fewshot}-shot"
            name = f"harness{shots}"
        return label_of(name, self.limit, None if data is None else self.other_rows(data))

    def other_rows(self, data: DataSection) -> str | None:
        """Return the path where it is of other rows than a run's own, whose recipe has this `data`.

        That of a benchmark is another place of the same rows.
        """
        other = self.path is not None and data.custom and not same_place(self.path, data.path)
        return self.path if other else None

    def rows_per_batch(self, default: "int | Literal['auto']") -> "int | Literal['auto']":
        """Return the batch size that was typed, or the default."""
        if self.batch_size is None:
            return default
        return "auto" if self.batch_size == "auto" else int(self.batch_size)

    def check(self) -> None:
        """Raise MocError naming all that is wrong with the options themselves."""
        if (self.run is None) == (self.model is None):
            raise MocError("give either a run folder or --model ID", "moc eval --help")
        run, harness = self.run is not None, self.harness is not None
        harness_tasks = self.harness or ()
        moved = self.base_options.path is not None or self.base_options.allow_changes
        of_model, not_here = "goes with --model; a run has its own", "cannot be used with --harness"
        of_harness = self.tasks_path is not None or self.num_fewshot is not None
        only_base = "--base goes with a run; with --model the base is all that is scored"
        not_compiled = "--torch-compile: --harness generates without compiling"
        cases: list[tuple[object, str]] = [
            (run and self.suite, f"--suite {of_model}"),
            (run and self.dtype, f"--dtype {of_model}"),
            (not run and self.base, only_base),
            (not run and moved, "--base-path and --allow-changed-base go with a run"),
            (len(set(self.tasks)) < len(self.tasks), "--tasks: a task is named twice"),
            (not harness and of_harness, "--tasks-path and --num-fewshot go with --harness"),
            (harness and self.tasks, f"--tasks: {not_here}"),
            (harness and self.suite, f"--suite: {not_here}"),
            (harness and self.path, f"--path: {not_here}"),
            (harness and self.protocol, f"--protocol: {not_here}"),
            (harness and self.torch_compile, not_compiled),
            (harness and not harness_tasks, "--harness: no task is named"),
            (len(set(harness_tasks)) < len(harness_tasks), "--harness: a task is named twice"),
        ]
        mistakes = [message for is_wrong, message in cases if is_wrong]
        closed = {
            "--protocol": (self.protocol, CHOICE.protocols),
            "--dtype": (self.dtype, DTYPES),
            "--device": (self.device, DEVICES),
        }
        for name, (value, allowed) in closed.items():
            if value is not None and value not in allowed:
                mistakes.append(f"{name}: found '{value}'{choices(value, allowed)}")
        size = self.batch_size
        if size not in (None, "auto") and not (size.isdecimal() and int(size) > 0):
            mistakes.append(
                f"--batch-size: found '{size}'; allowed: auto, or a whole number of at least 1"
            )
        refuse(mistakes)


def label_of(name: str, limit: int | None, rows: str | None = None) -> str:
    """Return the name of results, with the path of other `rows` and the limit where there are."""
    if rows is not None:
        file = Path(absolute_path(rows))
        stem = file.name[: -len(suffix_of(file) or "") or None]
        name += "-" + re.sub(r"[^\w.+-]+", "-", stem)
    return name if limit is None else f"{name}-limit-{limit}"


def refuse(mistakes: list[str]) -> None:
    """Raise MocError naming all mistakes, if there are any."""
    if mistakes:
        raise MocError("\n".join(mistakes), "moc eval --help")
