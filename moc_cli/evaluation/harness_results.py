"""What results.json and samples.jsonl say of what lm-evaluation-harness found."""

from typing import Any

import numpy as np

from moc_cli.evaluation.results_folder import ResultsFolder, mean_of_main


class HarnessResults(ResultsFolder):
    """Subtasks stand beside their group; the average is that of what was asked for."""

    def to_json(self) -> dict[str, Any]:
        """Return what results.json says; means of different metrics have no average."""
        told = super().to_json()
        asked = [entry for entry in self.tasks.values() if "part_of" not in entry]
        if len({entry["metric"] for entry in asked}) > 1:
            return told | {"average": None, "average_of_base": None}
        means = {"average": mean_of_main(asked, "value")}
        return told | means | {"average_of_base": mean_of_main(asked, "base")}


def entries(results: dict[str, Any], how: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what results.json says of every task and group."""
    parents = {
        child: group for group, members in results["group_subtasks"].items() for child in members
    }
    found = {}
    for name, metrics in results["results"].items():
        keys = [key for key in metrics if "," in key and "_stderr," not in key]
        if not keys:
            continue  # a group that only names its subtasks
        scores = dict(_score(results, name, key) for key in keys)
        n, rows = _counts(results, name)
        found[name] = {
            "metric": next(iter(scores)),
            "metrics": scores,
            "rows": rows,
            "limited": n < rows,
            **how,
            "version": results["versions"].get(name),
            "num_fewshot": results["n-shot"].get(name),
            "task_hash": _hash(results["samples"].get(name)),
        }
    for name in found.keys() & parents.keys():
        if parents[name] in found:
            found[name]["part_of"] = parents[name]
    return found


def _score(results: dict[str, Any], name: str, key: str) -> tuple[str, dict[str, Any]]:
    """One metric's name and numbers; lm_eval names it `metric,filter`."""
    metric, chosen = key.split(",", 1)
    stderr = results["results"][name].get(f"{metric}_stderr,{chosen}")
    return metric if chosen == "none" else f"{metric} ({chosen})", {
        "value": results["results"][name][key],
        "stderr": stderr if isinstance(stderr, float) else None,
        "majority": None,
        "n": _counts(results, name)[0],
        "higher_is_better": results["higher_is_better"].get(name, {}).get(metric),
    }


def _counts(results: dict[str, Any], name: str) -> tuple[int, int]:
    """Scored rows and all rows, of a task or of a group's tasks together."""
    known = results["n-samples"].get(name)
    if known is not None:
        return known["effective"], known["original"]
    pairs = [_counts(results, child) for child in results["group_subtasks"].get(name, ())]
    return sum(n for n, _ in pairs), sum(rows for _, rows in pairs)


def samples(logged: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """A line for every row of a task and filter: what was asked, by hash, and what came back."""
    return {
        name: [
            {
                "row": row["doc_id"],
                "filter": row["filter"],
                "doc": row["doc_hash"][:16],
                "prompt": row["prompt_hash"][:16],
                "target": row["target"] if isinstance(row["target"], int) else str(row["target"]),
                **_responses(row["filtered_resps"]),
                **({"correct": row["acc"] == 1} if "acc" in row["metrics"] else {}),
                **{metric: _plain(row[metric]) for metric in row["metrics"]},
            }
            for row in rows
        ]
        for name, rows in logged.items()
    }


def _responses(answers: list[Any]) -> dict[str, Any]:
    """Likelihoods of the answers and the distance of the two best, or the text."""
    if all(isinstance(answer, float) for answer in answers):
        return {"scores": answers}  # of whole texts
    if not all(isinstance(answer, tuple | list) and len(answer) == 2 for answer in answers):
        return {"output": [_plain(answer) for answer in answers]}
    scores = [float(answer[0]) for answer in answers]
    if len(scores) < 2:
        return {"scores": scores}
    best, second, *_ = sorted(scores, reverse=True)
    return {"scores": scores, "prediction": scores.index(best), "margin": best - second}


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers and texts as they are, the rest as text."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | None) else str(value)


def _hash(samples: list[dict[str, Any]] | None) -> str | None:
    """lm_eval's hash of a task: its rows, prompts and targets, in order."""
    if not samples:
        return None
    from lm_eval.utils import hash_string

    parts = [row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in samples]
    return str(hash_string("".join(parts)))
