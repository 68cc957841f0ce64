"""What differs between runs beside their method, in sentences: apples are told from pears."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from moc_cli.comparison.runs import FINAL, Run
from moc_cli.recipe.tasks import is_classifier
from moc_cli.results import main_score

# Keys of the recipe's section train that make two trainings two experiments; batch and length have
# sentences of their own.
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16"),
)


def remarks(runs: Sequence[Run], label: str, tasks: Sequence[str]) -> list[str]:
    """Return a sentence for each condition that differs; `label` names the scores compared."""
    found = [
        _differ(runs, "base models", _base, "the runs do not start from the same weights"),
        _differ(runs, "tasks to train on", lambda run: ", ".join(run.recipe.data.tasks), ""),
        _differ(runs, "training rows", _train_rows, "the runs have not learned from the same data"),
        _differ(
            runs,
            "data.train_on_inputs",
            _inputs,
            "losses are means over other tokens, and scores are known to move with it",
        ),
        _differ(runs, "data.max_length", lambda run: run.recipe.data.max_length, ""),
        _differ(runs, "rows a step", batch, "steps and losses of one step are not alike"),
        _differ(runs, "numbers of steps", _steps, "the runs have not learned for the same time"),
        *(_differ(runs, f"train.{key}", _setting(key), "") for key in SETTINGS),
        _differ(runs, "seeds", lambda run: run.recipe.seed, "order and initialisation differ"),
        *_scoring(runs, label, tasks),
        _differ(runs, "machines", _machine, "times and speeds are not comparable"),
        _differ(runs, "kinds of peak memory", _memory_kind, "it is not the same measure"),
    ]
    return [*filter(None, found), *_states(runs, label)]


def batch(run: Run) -> int:
    """Return how many rows one optimizer step sees."""
    train = run.recipe.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


def _differ(
    runs: Sequence[Run], what: str, value: Callable[[Run], Any], meaning: str
) -> str | None:
    """Return "Different what: a in x; b in y and z (meaning)." where the runs' values differ.

    A run whose value is None, because it has not come so far, is left out.
    """
    groups: dict[Any, list[str]] = {}
    for run in runs:
        found = value(run)
        if found is not None:
            groups.setdefault(found, []).append(run.name)
    if len(groups) < 2:
        return None
    listed = "; ".join(f"{_shown(found)} in {_join(names)}" for found, names in groups.items())
    return f"Different {what}: {listed}" + (f" ({meaning})." if meaning else ".")


def _scoring(runs: Sequence[Run], label: str, tasks: Sequence[str]) -> list[str | None]:
    """Sentences on how the compared scores were made."""

    def condition(key: str) -> Callable[[Run], Any]:
        return lambda run: run.scores[label].conditions.get(key) if label in run.scores else None

    found: list[str | None] = [
        _differ(runs, "protocols", condition("protocol"), "the scores are not comparable"),
        _differ(runs, "limits", condition("limit"), "the scores are not of the same rows"),
    ]
    for task in tasks:
        found.append(
            _differ(
                runs,
                f"scored rows of {task}",
                partial(_scored_rows, label=label, task=task),
                "the scores are not of the same rows",
            )
        )
    return found


def _states(runs: Sequence[Run], label: str) -> list[str]:
    """Sentences on single runs: not finished, stopped early, scored with other controls."""
    found = []
    for run in runs:
        if run.results is None:
            found.append(f"{run.name} has not finished: its last logged step is {run.step:,}.")
        elif run.results["stopped"] == "early":
            found.append(f"{run.name} stopped early, at step {run.results['steps']:,}.")
        scores = run.scores.get(label)
        if scores is None:
            continue
        if label != FINAL and scores.conditions.get("controls_sha256") != run.controls.get(
            "payload_sha256"
        ):
            found.append(
                f"{run.name} holds other controls than its scores in eval/{label} were made with: "
                "run moc eval again."
            )
        cut = [
            f"{name} ({main_score(entry)['n']:,} of {entry['rows']:,} rows)"
            for name, entry in scores.tasks.items()
            if entry.get("limited")
        ]
        if cut:
            found.append(f"{run.name} was scored on a part of {_join(cut)}.")
    return found


def _base(run: Run) -> str | None:
    model = run.environment.get("model", {})
    if "weights_sha256" not in model:
        return None
    return f"{model['name']} ({model['weights_sha256'][:8]})"


def _fingerprint(run: Run, part: str) -> str | None:
    found = run.environment.get("data", {}).get(part)
    return None if found is None else f"{found['rows']:,} rows ({found['sha256'][:8]})"


def _train_rows(run: Run) -> str | None:
    return _fingerprint(run, "train")


def _scored_rows(run: Run, label: str, task: str) -> str | None:
    if label == FINAL:
        return _fingerprint(run, f"test {task}")
    entry = run.scores[label].tasks.get(task) if label in run.scores else None
    if entry is None or "rows_sha256" not in entry:
        return None
    return f"{main_score(entry)['n']:,} rows ({entry['rows_sha256'][:8]})"


def _inputs(run: Run) -> bool | None:
    """Whether the loss covers prompts; a classifier has none of that kind."""
    data = run.recipe.data
    classifier = is_classifier(data.suite, data.tasks[0], data.format)
    return None if classifier else data.train_on_inputs


def _setting(key: str) -> Callable[[Run], Any]:
    return lambda run: getattr(run.recipe.train, key)


def _steps(run: Run) -> int | None:
    return None if run.results is None else run.results["steps"]


def _machine(run: Run) -> str | None:
    device = run.environment.get("device")
    if not device:
        return None
    threads = f", {device['threads']} threads" if device.get("threads") else ""
    torch = run.environment.get("versions", {}).get("torch", "?")
    return f"{device['kind']} {device['name']}{threads}, torch {torch}"


def _memory_kind(run: Run) -> str | None:
    return None if run.results is None else str(run.results["memory"]["kind"])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
