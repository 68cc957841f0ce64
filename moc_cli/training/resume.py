"""Which run a checkpoint belongs to, and what may change when it is resumed."""

import json
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
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.model import ModelSection
from moc_cli.recipe.paths import PATH_KEYS, absolute_path, absolute_paths
from moc_cli.recipe.reference import keys
from moc_cli.recipe.schema import Recipe
from moc_cli.runs import RunFolder
from moc_cli.training.build import Built
from moc_cli.training.checkpoint import Snapshot
from moc_cli.training.step_errors import may_split

T = TypeVar("T")
History = list[dict[str, Any]]  # of environment.json
Scores = dict[str, dict[str, float]]  # task -> metric -> value

# Key or section -> what the user is warned of when it changed; "" where no warning is needed.
FROM_HERE, FOLLOWS = "from this step on", "the rate follows the new number of steps"
CHANGEABLE = {
    "output": "",
    "launch.num_processes": "",
    "launch.num_machines": "",
    "launch.machine_rank": "",
    "launch.main_process_ip": "",
    "launch.main_process_port": "",
    "launch.ddp_timeout": "",
    "launch": "results may differ in their last bits",
    "model.model_name_or_path": "the same weights in another place",
    "model.tokenizer_name": "the same vocabulary in another place",
    "data.path": "",
    "train.num_train_epochs": FOLLOWS,
    "train.max_steps": FOLLOWS,
    "train.learning_rate": FROM_HERE,
    "train.loraplus_lr_ratio": FROM_HERE,
    "method.gate.learning_rate": FROM_HERE,
    "train.max_grad_norm": FROM_HERE,
    "train.activation_checkpointing": "",
    "train.gradient_checkpointing": "",
    "train.tf32": "results may differ in their last bits",
    "train.torch_compile": "results may differ in their last bits",
    "train.packing": "results may differ in their last bits",
    "eval.per_device_eval_batch_size": "",
    "eval.eval_strategy": FROM_HERE,
    "eval.eval_steps": FROM_HERE,
    "eval.early_stopping_patience": FROM_HERE,
    "eval.torch_compile": "",
    "eval.before": "",
}
# What a resume may change, and with which another run is trained.
IN_USE = {key for key, rule in CHANGEABLE.items() if rule in (FROM_HERE, FOLLOWS)}
LENGTH = {"train.max_steps", "train.num_train_epochs"}
SAME_OPTIMIZERS = {"adamw", "adamw_fused"}  # one state, on a GPU and where there is none
BATCH_KEYS = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")
ALLOW = "--allow-changed-base"
OLD_BASE = (
    "name the folder of the old base with --base-path DIR, or start another run: --output-dir OTHER"
)
FACTS = {
    "vocabulary": "the tokenizer's vocabulary",
    "data": "the rows",
    "trainables": "what is trained",
}


def check_recipe(
    saved: dict[str, Any], wanted: dict[str, Any], processes: tuple[int, int] = (1, 1)
) -> list[str]:
    """Return a sentence on each harmless change of the recipe, or of the number of processes.

    `processes`: then and now. Raises RunError naming every key that makes it another run.
    """
    before, after = flatten(saved), flatten(wanted)
    old_world, world = processes
    then, now = _rows_a_step(before, old_world), _rows_a_step(after, world)
    defaults = {row.key: json.loads(row.default) for row in keys() if row.default}
    changes, refused = [], []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if key in PATH_KEYS:  # older runs kept paths as they were typed
            old, new = absolute_path(old), absolute_path(new)
        if old == new:
            continue
        if key not in before and new == defaults.get(key):  # a key of later versions
            continue
        if key in BATCH_KEYS and then == now:
            continue  # see `keep_place`
        if key == "train.optim" and {old, new} == SAME_OPTIMIZERS:
            changes.append(f"{key}: {old} -> {new}; {CHANGEABLE['launch']}")
            continue
        rule = next((rule for rule in CHANGEABLE if key == rule or key.startswith(f"{rule}.")), "")
        if not rule:
            refused.append(f"{key} ({_word(old)} then, {_word(new)} now)")
        elif CHANGEABLE[rule]:
            changes.append(f"{key}: {_word(old)} -> {_word(new)}; {CHANGEABLE[rule]}")
    hint = "resume with the old values, or start another run: --output-dir OTHER"
    if old_world != world and then == now:
        dropout = "; dropout draws other masks" if 1 in processes else ""
        changes.append(f"processes: {old_world} -> {world}; {now} rows a step as before{dropout}")
    elif old_world != world:
        refused.append(f"rows a step ({then} in {old_world} processes then, {now} in {world} now)")
        size, steps = BATCH_KEYS
        fitting, rest = divmod(then, after[size] * world)
        if not rest:
            hint = f"resume with --set {steps}={fitting}"
    if refused:
        recipe = "the recipe is not the one this run was started with"
        raise RunError(f"{recipe}: {', '.join(refused)}", hint)
    return changes


def is_finished(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether a folder holds the run of a recipe, done; a longer one is to be continued.

    Raises RunError where the folder holds a run of another recipe.
    """
    if not (folder.path / "results.json").is_file():
        return False
    results = folder.read_results()
    if results.get("status") != "finished" or results.get("unscored"):
        return False
    saved = load_recipe(folder.recipe_file).model_dump(mode="json")
    wanted = absolute_paths(recipe).model_dump(mode="json")
    for key, value in wanted["data"].items():
        if value is None:  # read from the rows of a custom dataset
            wanted["data"][key] = saved["data"][key]
    check_recipe(saved, wanted)
    before, after = flatten(saved), flatten(wanted)
    changed = {key for key in IN_USE if before.get(key) != after.get(key)}
    if changed - LENGTH:
        raise RunError(
            f"{folder.path} is finished with another {', '.join(sorted(changed - LENGTH))}",
            "take the values of then, or another folder: --output-dir OTHER",
        )
    return not changed


def keep_place(
    snapshot: Snapshot, recipe: Recipe, processes: int = 1
) -> tuple[Snapshot, list[str]]:
    """Return the checkpoint with its place in the epoch counted in the recipe's micro-batches.

    The sentence says that they are others than before. Raises RunError inside an epoch where rows
    are grouped by length: other micro-batches then hold other rows.
    """
    size, steps = BATCH_KEYS
    saved, wanted = flatten(snapshot.identity["recipe"]), flatten(recipe.model_dump())
    old, new = saved[size], wanted[size]
    if old == new:
        return snapshot, []
    rows = _rows_a_step(wanted, processes)
    split = f"micro-batches of {new} rows, {old} before; {rows} rows a step as before"
    counters = snapshot.counters
    if not may_split(counters.batch, recipe.train.group_by_length):
        raise RunError(
            f"step {counters.step} lies inside an epoch, and with train.group_by_length the order "
            f"of its rows depends on the size of micro-batches ({old} then, {new} now)",
            f"resume with --set {size}={old} --set {steps}={saved[steps]}, or from a checkpoint at "
            "the end of an epoch",
        )
    if getattr(recipe.method, "top_k", 0):
        split += "; each micro-batch votes on its own routes"
    moved = replace(counters, batch=counters.batch * old // new)
    return replace(snapshot, counters=moved), [split]


def check_weights(
    saved: dict[str, Any],
    model: ModelSection,
    built: Built,
    then: Mapping[str, str],
    *,
    allow_changes: bool = False,
) -> list[str]:
    """Return a sentence where the base's weights differ, and `allow_changes` lets them.

    Raises RunError for any other difference to those of the checkpoint; weights inside of a layer
    may never differ. `then` describes the base's tensors as the run folder knows them. Older
    checkpoints hold the hash of the weight files instead of the tensors'.
    """
    wanted = saved.get("weights")
    if wanted in (None, built.weights_hash):
        return []
    what, hint = f"the weights of the base model {built.name} changed", OLD_BASE
    if hash_tensors(then) == wanted:
        differences = find_differences(then, built.tensors)
        what += f" since the checkpoint was written:\n{list_differences(differences)}"
        if not any(map(in_a_layer, differences)):
            if allow_changes:
                return [what]
            hint += f"; no control touches these weights, if they are meant: {ALLOW}"
    elif known_hash(model.model_name_or_path, model.revision) == wanted:
        return []
    else:
        what += " since the checkpoint was written"
    raise RunError(what, hint)


def check_facts(
    saved: dict[str, Any], now: dict[str, Any], *, allow_changes: bool = False
) -> list[str]:
    """Return sentences on another number of threads, and another vocabulary where it is allowed.

    Raises RunError when vocabulary, rows or trainables are not those of the checkpoint. What an
    older checkpoint does not say is not compared.
    """
    changed = [key for key in FACTS if key in saved and saved[key] != now.get(key)]
    hint = "bring back the old files, or start another run: --output-dir OTHER"
    if changed == ["vocabulary"] and not allow_changes:
        hint += f"; if it is meant: {ALLOW}"
    if changed and not (changed == ["vocabulary"] and allow_changes):
        names = " and ".join(FACTS[key] for key in changed)
        raise RunError(f"{names} changed since the checkpoint was written", hint)
    sentences = [f"{FACTS[key]} changed since the checkpoint was written" for key in changed]
    if saved.get("threads") != now.get("threads"):
        sentences.append(
            f"threads: {saved.get('threads')} -> {now.get('threads')}; "
            "results may differ in their last bits"
        )
    return sentences


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


def _rows_a_step(recipe: Mapping[str, Any], processes: int) -> int:
    """Rows of one optimizer step in all processes, of a recipe with dotted keys."""
    size, steps = (int(recipe[key]) for key in BATCH_KEYS)
    return size * steps * processes


def _word(value: Any) -> str:
    return "nothing" if value is None else str(value)
