"""Tasks of lm-evaluation-harness on an adapted model: an optional extra, `moc-cli[harness]`.

lm_eval reads the rows, makes the requests and counts the metrics; the model answers them by our
rules (see harness_model). Nothing is sent anywhere: rows come from the hub or a folder, and metrics
that would be fetched as code are refused.
"""

import difflib
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moc_cli.errors import DataError, MocError
from moc_cli.evaluation.harness_model import HarnessModel
from moc_cli.evaluation.harness_results import HarnessResults, entries, samples
from moc_cli.evaluation.session import model_facts
from moc_cli.load_run import LoadedModel
from moc_cli.report.progress import WorkProgress
from moc_cli.scoring.batch_size import Asked

BOOTSTRAP = 1000  # draws behind the standard error of a metric that is no plain mean
INSTALL = "pip install 'moc-cli[harness]'"


@dataclass(frozen=True)
class HarnessPlan:
    """Which tasks, groups or tags are run, and how; None leaves a task's own number of shots.

    `limit` takes the first rows of each task, as lm_eval does. `path` is a folder of task files.
    """

    names: Sequence[str]
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: Asked = "auto"
    path: Path | None = None
    base: bool = False

    @property
    def label(self) -> str:
        """Names the conditions in a folder's name."""
        shots = "" if self.num_fewshot is None else f"-{self.num_fewshot}-shot"
        return f"harness{shots}" + ("" if self.limit is None else f"-limit-{self.limit}")

    @property
    def conditions(self) -> dict[str, Any]:
        """What the numbers depend on, beside the subject and the tasks."""
        return {
            "suite": "lm-evaluation-harness",
            "protocol": "harness",
            "lm_eval_version": version("lm_eval"),
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
        }


def check_installed() -> None:
    """Raise MocError where the extra is missing."""
    if find_spec("lm_eval") is None:
        raise MocError("--harness needs lm-evaluation-harness, which is not installed", INSTALL)


def load_tasks(plan: HarnessPlan) -> dict[str, dict[str, Any]]:
    """Read the rows of every task asked for, by its name; raises DataError for all mistakes."""
    check_installed()
    if plan.path is not None and not plan.path.is_dir():
        raise DataError(f"--tasks-path: no folder {plan.path}")
    _stay_at_home()
    manager = _manager(plan)
    unknown = [name for name in plan.names if name not in manager.task_index]
    if unknown:
        raise DataError(
            "\n".join(f"--harness: no task '{name}'{_near(name, manager)}" for name in unknown),
            "lm-eval ls tasks lists them; --tasks-path DIR adds your own",
        )
    found, wrong = {}, []
    with _numbers_from_zero():
        for name in plan.names:
            try:
                found[name] = dict(manager.load([name]))
            except (OSError, ValueError, ImportError) as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                wrong.append(f"--harness: the rows of '{name}' are out of reach: {first}")
                continue
            for task in found[name]["tasks"].values():
                _set_shots(task, plan.num_fewshot)
    if wrong:
        raise DataError(
            "\n".join(wrong),
            "lm_eval reads them from the hub: run once online, or give tasks with local rows: "
            "--tasks-path DIR",
        )
    return found


def _manager(plan: HarnessPlan) -> Any:
    """lm_eval's index of tasks; its own thousands are only looked through if they are needed."""
    from lm_eval.tasks import TaskManager

    if plan.path is not None:
        own = TaskManager(include_path=str(plan.path), include_defaults=False)
        if all(name in own.task_index for name in plan.names):
            return own
    return TaskManager(include_path=None if plan.path is None else str(plan.path))


def run(
    subject: LoadedModel,
    plan: HarnessPlan,
    tasks: dict[str, dict[str, Any]],
    folder: Path,
    *,
    silent: bool = False,
) -> HarnessResults:
    """Run the tasks, and write results.json and samples.jsonl after each name asked for."""
    report = HarnessResults(folder, model_facts(subject) | plan.conditions)
    for name, loaded in tasks.items():
        found = _evaluate(subject, plan, name, loaded, silent)
        bare = None
        if plan.base:
            with subject.adapted.disabled():
                bare = _evaluate(subject, plan, f"{name} (base)", loaded, silent)
        for task, entry in found.entries.items():
            if bare is not None:
                for metric, score in entry["metrics"].items():
                    score["base"] = bare.entries[task]["metrics"][metric]["value"]
                entry["base_source"] = "scored beside it"
            report.add(task, entry, found.samples.get(task, []))
    return report


@dataclass(frozen=True)
class _Found:
    entries: dict[str, dict[str, Any]]
    samples: dict[str, list[dict[str, Any]]]


def _evaluate(
    subject: LoadedModel, plan: HarnessPlan, label: str, loaded: dict[str, Any], silent: bool
) -> _Found:
    """Run what one name stands for: a task, or a group with all its subtasks."""
    from lm_eval.evaluator import evaluate

    begin = time.perf_counter()
    with _Bars(label, silent) as bars, _numbers_from_zero():
        model = HarnessModel(
            subject.adapted, subject.tokenizer, batch_size=plan.batch_size, observe=bars.observe
        )
        results: Any = evaluate(
            model, loaded, limit=plan.limit, bootstrap_iters=BOOTSTRAP, log_samples=True
        )
    how = {
        "seconds": time.perf_counter() - begin,
        "batch_size": model.size.used,
        "halved": model.size.halved,
        "cut": model.cut,
    }
    return _Found(entries(results, how), samples(results["samples"]))


class _Bars(ExitStack):
    """A bar for each kind of request, from its first batch on: lm_eval shows its own before."""

    def __init__(self, label: str, silent: bool) -> None:
        super().__init__()
        self._label, self._silent = label, silent
        self._kind: str | None = None
        self._bar: WorkProgress

    def observe(self, kind: str, done: int, total: int) -> None:
        """Show that `done` requests of a kind are done."""
        if kind != self._kind:
            self.close()
            self._kind = kind
            name = f"{self._label}, {kind}"
            self._bar = self.enter_context(WorkProgress(name, total, silent=self._silent))
        self._bar.observe(done, total)


def _near(name: str, manager: Any) -> str:
    close = difflib.get_close_matches(name, manager.all_tasks, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _set_shots(task: Any, shots: int | None) -> None:
    """Set how many solved examples stand before a question; a task that wants none gets none."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextmanager
def _numbers_from_zero() -> Iterator[None]:
    """Within it random numbers begin where lm_eval's own command lets them begin."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(DEFAULT_RANDOM_SEED)
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _stay_at_home() -> None:
    """Before lm_eval is imported: no reports of use, no code from the hub, no pool of processes."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # its variable was read long ago
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets would report every load of a file
    os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
