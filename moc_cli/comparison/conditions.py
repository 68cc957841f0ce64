"""What differs between runs besides the method, one sentence for each condition."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

from moc_cli.comparison.runs import FINAL, Run
from moc_cli.files import flatten
from moc_cli.recipe.quantization import of_arguments
from moc_cli.report.numbers import percent
from moc_cli.results import main_score

# Keys of the recipe's section `train` that make two trainings different experiments; batch and
# length have sentences of their own.
SETTINGS = (
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "warmup_ratio", "weight_decay"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16"),
)

IN_NAME = ("name", "rank", "top_k", "alpha", "sites")  # what the tables show with a method


def notes(runs: Sequence[Run], label: str, tasks: Sequence[str]) -> list[str]:
    """Return a sentence for each condition that differs, then those about single runs.

    `label` names the scores that are compared.
    """
    sentences = (_difference(runs, *condition) for condition in _conditions(label, tasks))
    return [*filter(None, [*sentences, *_methods(runs)]), *_states(runs, label)]


def batch(run: Run) -> int:
    """Return how many rows one optimizer step sees."""
    train = run.recipe.train
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


Condition = tuple[str, Callable[[Run], Any], str]  # what it is, its value, what a difference means


def _conditions(label: str, tasks: Sequence[str]) -> Iterator[Condition]:
    yield "base models", _base, "the runs do not start from the same weights"
    yield (
        "weights of the base",
        _base_precision,
        "scores differ a little even with the same controls",
    )
    yield "shares of trained parameters", _share, "a run that trains more may fit better"
    yield "tasks to train on", lambda run: ", ".join(run.recipe.data.tasks), ""
    yield "training rows", _rows_of("train"), "the runs have not learned from the same data"
    yield (
        "data.train_on_inputs",
        _train_on_inputs,
        "losses are means over other tokens, and scores depend on it too",
    )
    yield "data.max_length", attrgetter("recipe.data.max_length"), ""
    yield "rows a step", batch, "steps and losses of one step are not comparable"
    yield "numbers of steps", _result("steps"), "the runs have not learned for the same time"
    for key in SETTINGS:
        yield f"train.{key}", attrgetter(f"recipe.train.{key}"), ""
    yield "seeds", attrgetter("recipe.seed"), "order and initialisation differ"
    yield "protocols", _scored_under(label, "protocol"), "the scores are not comparable"
    not_same_rows = "the scores are not of the same rows"
    yield "limits", _scored_under(label, "limit"), not_same_rows
    for task in tasks:
        yield f"scored rows of {task}", _scored_rows(label, task), not_same_rows
    yield "machines", _machine, "times and speeds are not comparable"
    yield "kinds of peak memory", _result("memory", "kind"), "it is not the same measure"


def _difference(
    runs: Sequence[Run], name: str, value: Callable[[Run], Any], meaning: str
) -> str | None:
    """Return "Different name: a in x; b in y and z (meaning)." where the runs' values differ.

    A run without the value, because it has not finished, is left out.
    """
    groups: dict[Any, list[str]] = {}
    for run in runs:
        condition = value(run)
        if condition is not None:
            groups.setdefault(condition, []).append(run.name)
    if len(groups) < 2:
        return None
    listed = "; ".join(f"{_text(value)} in {_join(names)}" for value, names in groups.items())
    return f"Different {name}: {listed}" + (f" ({meaning})." if meaning else ".")


def _methods(runs: Sequence[Run]) -> Iterator[str | None]:
    """Yield a sentence for each key of a method that differs, and that the tables do not show."""
    for name in dict.fromkeys(run.recipe.method.name for run in runs):
        alike = [run for run in runs if run.recipe.method.name == name]
        for key in _method_keys(alike[0]):
            if key not in IN_NAME:
                yield _difference(alike, f"method.{key}", partial(_method_value, key=key), "")


def _method_keys(run: Run) -> dict[str, Any]:
    return flatten(run.recipe.method.model_dump(mode="json"))


def _method_value(run: Run, key: str) -> Any:
    value = _method_keys(run).get(key)
    return str(value) if isinstance(value, list) else value


def _states(runs: Sequence[Run], label: str) -> Iterator[str]:
    """Yield sentences on single runs: not finished, stopped early, scored with other controls."""
    for run in runs:
        if run.results is None and not run.lines:
            yield f"{run.name} has no record of a training: its controls were trained elsewhere."
        elif run.results is None:
            yield f"{run.name} has not finished: its last logged step is {run.step:,}."
        elif run.results["stopped"] == "early":
            yield f"{run.name} stopped early, at step {run.results['steps']:,}."
        scores = run.scores.get(label)
        if scores is None:
            continue
        scored = scores.conditions.get("controls_sha256")
        if label != FINAL and run.controls and scored != run.controls.get("payload_sha256"):
            yield (
                f"{run.name} holds other controls than its scores in eval/{label} were made with: "
                "run moc eval again."
            )
        limited = [
            f"{name} ({main_score(entry)['n']:,} of {entry['rows']:,} rows)"
            for name, entry in scores.tasks.items()
            if entry.get("limited")
        ]
        if limited:
            yield f"{run.name} was scored on a part of {_join(limited)}."


@dataclass(frozen=True)
class _Base:
    """A base model, whatever it is called: it may lie in another folder for each run."""

    sha256: str
    name: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.name} ({self.sha256[:8]})"


def _base(run: Run) -> _Base | None:
    """The base by its fingerprint, which does not depend on the type that it was loaded in."""
    model = run.environment.get("model", {})
    fingerprint = (run.controls.get("base_fingerprint") or {}).get("bfloat16")
    sha256 = fingerprint or model.get("weights_sha256")
    return None if sha256 is None else _Base(sha256, model.get("name", "a model"))


def _base_precision(run: Run) -> str | None:
    """How the base's linear weights were kept in training."""
    if not run.controls:
        return None
    return str(of_arguments(run.controls.get("base_quantization")) or "unquantised")


def _share(run: Run) -> str | None:
    """The trained parameters in percent of the base's."""
    parameters = (run.results or {}).get("parameters")
    return None if parameters is None else f"{percent(parameters['share'], 3)} of the base"


def _rows_of(part: str) -> Callable[[Run], str | None]:
    """Number and fingerprint of the rows of a part of the data, as training read them."""

    def value(run: Run) -> str | None:
        rows = run.environment.get("data", {}).get(part)
        return None if rows is None else f"{rows['rows']:,} rows ({rows['sha256'][:8]})"

    return value


def _scored_rows(label: str, task: str) -> Callable[[Run], str | None]:
    if label == FINAL:
        return _rows_of(f"test {task}")

    def value(run: Run) -> str | None:
        entry = run.scores[label].tasks.get(task) if label in run.scores else None
        if entry is None or "rows_sha256" not in entry:
            return None
        return f"{main_score(entry)['n']:,} rows ({entry['rows_sha256'][:8]})"

    return value


def _scored_under(label: str, key: str) -> Callable[[Run], Any]:
    return lambda run: run.scores[label].conditions.get(key) if label in run.scores else None


def _train_on_inputs(run: Run) -> bool | None:
    """Whether the loss covers prompts; None where rows have none."""
    data = run.recipe.data
    return data.train_on_inputs if data.kind.prompted else None


def _result(*keys: str) -> Callable[[Run], Any]:
    def value(run: Run) -> Any:
        inner: Any = run.results
        for key in keys:
            inner = None if inner is None else inner[key]
        return inner

    return value


def _machine(run: Run) -> str | None:
    device = run.environment.get("device")
    if not device:
        return None
    threads = f", {device['threads']} threads" if device.get("threads") else ""
    torch = run.environment.get("versions", {}).get("torch", "?")
    return f"{device['kind']} {device['name']}{threads}, torch {torch}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
