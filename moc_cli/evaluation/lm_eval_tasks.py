"""Tasks of lm-evaluation-harness on an adapted model: an optional extra, `moc-cli[harness]`.

lm_eval reads the rows, makes the requests and computes the metrics; the model answers them by our
rules (lm_eval_model). Nothing is sent anywhere: rows come from the hub or a folder, and metrics
that would be fetched as code are refused.
"""

import json
import os
import random
import time
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moc_cli.errors import DataError, MocError
from moc_cli.evaluation.options import EvalOptions
from moc_cli.evaluation.results_folder import ResultsFolder, mean_of_main
from moc_cli.evaluation.session import model_facts
from moc_cli.load_run import LoadedModel
from moc_cli.recipe.suggest import did_you_mean
from moc_cli.report.progress import WorkProgress

BOOTSTRAP = 1000  # resamples behind the standard error of a metric that is not a plain mean
INSTALL = "pip install 'moc-cli[harness]'"


class LmEvalFolder(ResultsFolder):
    """results.json and samples.jsonl; subtasks stand beside their group, and the average is that of
    the tasks that were named.
    """

    def to_json(self) -> dict[str, Any]:
        """Return what results.json says; means of different metrics have no average."""
        scored_tasks = [entry for entry in self.tasks.values() if "part_of" not in entry]
        is_one_metric = len({entry["metric"] for entry in scored_tasks}) == 1
        return super().to_json() | {
            "average": mean_of_main(scored_tasks, "value") if is_one_metric else None,
            "average_of_base": mean_of_main(scored_tasks, "base") if is_one_metric else None,
        }


def load_tasks(options: EvalOptions) -> dict[str, dict[str, Any]]:
    """Read the rows of every named task; raises DataError with all mistakes at once."""
    if find_spec("lm_eval") is None:
        raise MocError("--harness needs lm-evaluation-harness, which is not installed", INSTALL)
    if options.tasks_path is not None and not options.tasks_path.is_dir():
        raise DataError(f"--tasks-path: no folder {options.tasks_path}")
    no_telemetry()
    names = options.harness or ()
    manager = _task_manager(options)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        raise DataError(
            "\n".join(
                f"--harness: no task '{name}'{did_you_mean(name, manager.all_tasks)}"
                for name in unknown
            ),
            "lm-eval ls tasks lists them; --tasks-path DIR adds your own",
        )
    loaded, wrong = {}, []
    set_seeds()
    for name in names:
        try:
            loaded[name] = dict(manager.load([name]))
        except (OSError, ValueError, ImportError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            wrong.append(f"--harness: the rows of '{name}' are out of reach: {first}")
            continue
        for task in loaded[name]["tasks"].values():
            _set_shots(task, options.num_fewshot)
    if wrong:
        raise DataError(
            "\n".join(wrong),
            "lm_eval reads them from the hub: run once online, or give tasks with local rows: "
            "--tasks-path DIR",
        )
    return loaded


def _task_manager(options: EvalOptions) -> Any:
    """lm_eval's index of tasks; its own thousands are only read if they are needed."""
    from lm_eval.tasks import TaskManager

    path = None if options.tasks_path is None else str(options.tasks_path)
    if path is not None:
        local = TaskManager(include_path=path, include_defaults=False)
        if all(name in local.task_index for name in options.harness or ()):
            return local
    return TaskManager(include_path=path)


def _set_shots(task: Any, shots: int | None) -> None:
    """Set how many solved examples stand before a question; a task that wants none gets none."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    default_shots = task.get_config("num_fewshot")
    if default_shots is None or (shots is not None and default_shots != 0):
        task.set_config(key="num_fewshot", value=shots or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def run(
    options: EvalOptions,
    tasks: dict[str, dict[str, Any]],
    model: LoadedModel,
    folder: Path,
) -> tuple[LmEvalFolder, dict[str, dict[str, Any]]]:
    """Run the tasks; results.json and samples.jsonl are written after each name.

    Returns their folder, and lm_eval's results by model (`model`, `base model`).
    """
    conditions = {
        "suite": "lm-evaluation-harness",
        "protocol": "harness",
        "lm_eval_version": version("lm_eval"),
        "limit": options.limit,
        "num_fewshot": options.num_fewshot,
    }
    written = LmEvalFolder(folder, model_facts(model) | conditions)
    by_model: dict[str, dict[str, Any]] = {}
    for name, loaded in tasks.items():
        results, entries = _evaluate(options, name, loaded, model)
        _merge(by_model.setdefault("model", {}), results)
        if options.base:
            with model.adapted.disabled():
                base, bare = _evaluate(options, f"{name} (base)", loaded, model)
            _merge(by_model.setdefault("base model", {}), base)
            for task, entry in entries.items():
                for metric, score in entry["metrics"].items():
                    score["base"] = bare[task]["metrics"][metric]["value"]
                entry["base_source"] = "scored with it"
        for task, entry in entries.items():
            written.add(task, entry, _samples(results["samples"].get(task, [])))
    return written, by_model


def _merge(merged: dict[str, Any], results: dict[str, Any]) -> None:
    """Add the parts of lm_eval's results that its table shows, each a mapping by task."""
    for part in ("results", "group_subtasks", "versions", "n-shot", "higher_is_better"):
        merged[part] = merged.get(part, {}) | results[part]


def _evaluate(
    options: EvalOptions, name: str, loaded: dict[str, Any], model: LoadedModel
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Run what one name stands for: lm_eval's results, and our entry of each task and group."""
    from lm_eval.evaluator import evaluate

    from moc_cli.evaluation.lm_eval_model import MocLM

    begin = time.perf_counter()
    set_seeds()
    with ProgressPerKind(name) as progress:
        language_model = MocLM(
            model,
            batch_size=options.rows_per_batch("auto"),
            observe=progress.observe,
        )
        results: Any = evaluate(
            language_model, loaded, limit=options.limit, bootstrap_iters=BOOTSTRAP, log_samples=True
        )
    how = {
        "seconds": time.perf_counter() - begin,
        "batch_size": language_model.batch.used,
        "halved": language_model.batch.halved,
        "cut": language_model.cut,
    }
    return results, _entries(results, how)


def _entries(results: dict[str, Any], how: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what results.json says of every task and group."""
    parents = {
        child: group for group, members in results["group_subtasks"].items() for child in members
    }
    entries: dict[str, dict[str, Any]] = {}
    for name, values in results["results"].items():
        n, rows = _counts(results, name)
        scores = {}
        for key, value in values.items():
            metric, _, chosen = key.partition(",")  # lm_eval's name of a metric and a filter
            if not chosen or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{chosen}")
            scores[metric if chosen == "none" else f"{metric} ({chosen})"] = {
                "value": value,
                "stderr": stderr if isinstance(stderr, float) else None,
                "majority": None,
                "n": n,
                "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
            }
        if not scores:
            continue  # a group that only names its subtasks
        samples = results["samples"].get(name)
        entries[name] = {
            "metric": next(iter(scores)),
            "metrics": scores,
            "rows": rows,
            "limited": n < rows,
            **how,
            "version": results["versions"].get(name),
            "num_fewshot": results["n-shot"].get(name),
            "task_hash": _task_hash(samples) if samples else None,
        }
    for name in entries.keys() & parents.keys():
        if parents[name] in entries:
            entries[name]["part_of"] = parents[name]
    return entries


def _counts(results: dict[str, Any], name: str) -> tuple[int, int]:
    """Scored rows and all rows, of a task or of a group's tasks together."""
    counts = results["n-samples"].get(name)
    if counts is not None:
        return counts["effective"], counts["original"]
    members = [_counts(results, child) for child in results["group_subtasks"].get(name, ())]
    return sum(n for n, _ in members), sum(rows for _, rows in members)


def _samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """lm_eval's own line of every row, with the keys by which `moc compare` pairs two runs."""
    from lm_eval.utils import handle_non_serializable

    lines = []
    for row in rows:
        pairing = {"row": row["doc_id"], "prompt": row["prompt_hash"][:16]}
        if "acc" in row["metrics"]:
            pairing["correct"] = row["acc"] == 1
        lines.append(json.loads(json.dumps(pairing | row, default=handle_non_serializable)))
    return lines


def _task_hash(samples: list[dict[str, Any]]) -> str:
    """lm_eval's hash of a task: its rows, prompts and targets, in order."""
    from lm_eval.utils import hash_string

    parts = [row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in samples]
    return str(hash_string("".join(parts)))


class ProgressPerKind(ExitStack):
    """A progress bar for each kind of request, opened with its first batch."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self._label = label
        self._kind: str | None = None
        self._bar: WorkProgress

    def observe(self, kind: str, done: int, total: int) -> None:
        """Show that `done` requests of a kind are done."""
        if kind != self._kind:
            self.close()
            self._kind = kind
            name = f"{self._label}, {kind}"
            self._bar = self.enter_context(WorkProgress(name, total))
        self._bar.observe(done, total)


def set_seeds() -> None:
    """Start random numbers from the seeds of lm_eval's own command."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def no_telemetry() -> None:
    """Before lm_eval is imported: no reports of use, no code from the hub, no pool of processes."""
    from huggingface_hub import constants

    constants.HF_HUB_DISABLE_TELEMETRY = True  # its variable is read when the hub is imported
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # datasets would report every load of a file
    os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
