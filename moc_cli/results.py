"""The entry of a scored task in results.json, and the one reader of it.

Format 2, the same for `moc train`, `moc eval` and lm-evaluation-harness:

    {"metric": "accuracy", "metrics": {"accuracy": {...}, "f1": {...}}, "seconds": 1.5, ...}

`metric` names the main one. Each metric holds `value`, `stderr`, `majority` (what the best constant
answer scores), `n` (items), and the value without the method in the model: `before` (training) or
`base` (evaluation; `base_source` says where it is from). Values are fractions, but for those
that `is_fraction` leaves out. Format 1 had the main metric's numbers in the entry itself, those of
others in a list `also`, and the base model's under `base` in the same way.
"""

from collections.abc import Mapping
from typing import Any

FORMAT = 2
LOWER_IS_BETTER = ("loss", "perplexity")
# Metrics that are no fractions, and those of lm-evaluation-harness that count otherwise.
_OTHER_SCALES = ("loss", "bits_per_byte", "bleu", "chrf", "chrf++", "ter")
_OF_METRIC = ("value", "stderr", "majority", "n", "before", "higher_is_better")
_DROPPED = ("also", "base", *_OF_METRIC)


def read_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a results.json in format 2, whichever format it has.

    Raises ValueError where it holds something else.
    """
    if "answerless" in results:  # the former name of a key of `moc train`
        results = {
            "answers_cut_off" if key == "answerless" else key: value
            for key, value in results.items()
        }
    if results.get("format") == FORMAT:
        return dict(results)
    tasks = results.get("tasks", {})
    if not isinstance(tasks, dict):
        raise ValueError("'tasks' is not an object")
    try:
        entries = {name: _from_format_1(entry) for name, entry in tasks.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"a task's entry is damaged: {error!r}") from error
    return {**results, "format": FORMAT} | ({"tasks": entries} if "tasks" in results else {})


def main_score(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of an entry's main metric."""
    score: dict[str, Any] = entry["metrics"][entry["metric"]]
    return score


def is_fraction(metric: str) -> bool:
    """Return whether a metric is shown in hundredths; a filter of lm_eval may follow its name."""
    name = metric.partition(" (")[0]
    return not name.endswith("perplexity") and name not in _OTHER_SCALES


def _from_format_1(entry: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {
        part["metric"]: {key: part[key] for key in _OF_METRIC if key in part}
        for part in [entry, *entry.get("also", [])]
    }
    rest = {key: value for key, value in entry.items() if key not in ("metric", *_DROPPED)}
    base = entry.get("base")
    if base is not None:
        for part in [base, *base.get("also", [])]:
            if part["metric"] in metrics:
                metrics[part["metric"]]["base"] = part["value"]
        rest["base_source"] = base.get("source")
    return {"metric": entry["metric"], "metrics": metrics} | rest
