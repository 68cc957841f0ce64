"""Whether a checkpoint belongs to the run that is resumed: its place, weights, rows, vocabulary."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from moc_cli.errors import RunError
from moc_cli.files import flatten
from moc_cli.models.fingerprint import (
    find_differences,
    hash_tensors,
    in_a_layer,
    list_differences,
)
from moc_cli.models.weight_files import known_hash
from moc_cli.recipe.model import ModelSection
from moc_cli.recipe.schema import Recipe
from moc_cli.runs import RunFolder
from moc_cli.training.build import Built
from moc_cli.training.changes import BATCH_KEYS, rows_a_step
from moc_cli.training.checkpoint import Snapshot
from moc_cli.training.step_errors import may_split

T = TypeVar("T")
History = list[dict[str, Any]]  # of environment.json
Scores = dict[str, dict[str, float]]  # task -> metric -> value

ALLOW = "--allow-changed-base"
OLD_BASE = (
    "name the folder of the old base with --base-path DIR, or start another run: --output-dir OTHER"
)
FACTS = {
    "vocabulary": "the tokenizer's vocabulary",
    "data": "the rows",
    "trainables": "what is trained",
}


def keep_place(
    snapshot: Snapshot, recipe: Recipe, processes: int = 1
) -> tuple[Snapshot, list[str]]:
    """Return the checkpoint with its place in the epoch counted in the recipe's micro-batches.

    The sentence says that they are others than before. Raises RunError inside an epoch where rows
    are grouped by length: other micro-batches then hold other rows.
    """
    size, steps = BATCH_KEYS
    saved, current = flatten(snapshot.identity["recipe"]), flatten(recipe.model_dump())
    old, new = saved[size], current[size]
    if old == new:
        return snapshot, []
    rows = rows_a_step(current, processes)
    split = f"micro-batches of {new} rows, {old} before; {rows} rows a step as before"
    counters = snapshot.counters
    if not may_split(counters.batch, recipe.train.group_by_length):
        fitting, remainder = divmod(rows, old * processes)
        way = f"with --set {size}={old} --set {steps}={fitting}"
        if remainder:  # of so many processes not even one micro-batch each
            way = f"in as many processes as then ({snapshot.identity.get('processes', 1)})"
        raise RunError(
            f"step {counters.step} lies inside an epoch, and with train.group_by_length the order "
            f"of its rows depends on the size of micro-batches ({old} then, {new} now)",
            f"resume {way}, or from a checkpoint at the end of an epoch",
        )
    if getattr(recipe.method, "top_k", 0):
        split += "; each micro-batch votes on its own routes"
    moved = replace(counters, batch=counters.batch * old // new)
    return replace(snapshot, counters=moved), [split]


def check_weights(
    saved: dict[str, Any],
    model: ModelSection,
    built: Built,
    saved_tensors: Mapping[str, str],
    *,
    allow_changes: bool = False,
) -> list[str]:
    """Return a sentence where the base's weights differ, and `allow_changes` lets them.

    Raises RunError for any other difference to those of the checkpoint; weights inside of a layer
    may never differ. `saved_tensors` describes the base's tensors as the run folder knows them.
    Older checkpoints hold the hash of the weight files instead of the tensors'.
    """
    expected_hash = saved.get("weights")
    if expected_hash in (None, built.weights_hash):
        return []
    message, hint = f"the weights of the base model {built.name} changed", OLD_BASE
    if hash_tensors(saved_tensors) == expected_hash:
        differences = find_differences(saved_tensors, built.tensors)
        message += f" since the checkpoint was written:\n{list_differences(differences)}"
        if not any(map(in_a_layer, differences)):
            if allow_changes:
                return [message]
            hint += f"; controls do not depend on these weights; to accept the change: {ALLOW}"
    elif known_hash(model.model_name_or_path, model.revision) == expected_hash:
        return []
    else:
        message += " since the checkpoint was written"
    raise RunError(message, hint)


def check_facts(
    saved: dict[str, Any], current: dict[str, Any], *, allow_changes: bool = False
) -> list[str]:
    """Return sentences on another number of threads, and another vocabulary where it is allowed.

    Raises RunError when vocabulary, rows or trainables are not those of the checkpoint. What an
    older checkpoint does not say is not compared.
    """
    changed = [key for key in FACTS if key in saved and saved[key] != current.get(key)]
    hint = "bring back the old files, or start another run: --output-dir OTHER"
    if changed == ["data"] and _holds_out_anew(saved, current):
        was, now = (facts["recipe"]["eval"]["eval_strategy"] for facts in (saved, current))
        hint = (
            f"eval.eval_strategy ({was} then, {now} now) decides whether training rows are held "
            f"out to be watched; resume with --set eval.eval_strategy={was}, or start another "
            "run: --output-dir OTHER"
        )
    if changed == ["vocabulary"] and not allow_changes:
        hint += f"; if it is meant: {ALLOW}"
    if changed and not (changed == ["vocabulary"] and allow_changes):
        names = " and ".join(FACTS[key] for key in changed)
        raise RunError(f"{names} changed since the checkpoint was written", hint)
    sentences = [f"{FACTS[key]} changed since the checkpoint was written" for key in changed]
    if saved.get("threads") != current.get("threads"):
        sentences.append(
            f"threads: {saved.get('threads')} -> {current.get('threads')}; "
            "results may differ in their last bits"
        )
    return sentences


def _holds_out_anew(saved: dict[str, Any], current: dict[str, Any]) -> bool:
    """Return whether rows are held out of a custom dataset since it is watched, or no more."""
    counts = [facts["data"].get("validation", {}).get("rows") for facts in (saved, current)]
    strategies = [
        facts.get("recipe", {}).get("eval", {}).get("eval_strategy") for facts in (saved, current)
    ]
    return "no" in strategies and len(set(strategies)) == 2 and 0 in counts and any(counts)


def known_of(folder: RunFolder, warn: Callable[[str], None]) -> tuple[History, Scores]:
    """Return when a run was started and resumed, and the untrained model's scores.

    What is damaged is passed over with a sentence to `warn`: it is written again.
    """

    def read(part: Callable[[], T]) -> T | None:
        try:
            return part()
        except RunError as error:
            warn(f"{error.message}; it is written again")
            return None

    return read(folder.read_history) or [], read(folder.read_scores_before) or {}
