"""What may change in a recipe when its run is resumed, and whether a folder holds its run, done.

No torch here: a sweep compares recipes to see which runs are finished.
"""

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from moc_cli.data.splits import written_out
from moc_cli.errors import RunError
from moc_cli.files import flatten
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.paths import PATH_KEYS, absolute_paths, absolute_value
from moc_cli.recipe.reference import keys
from moc_cli.recipe.schema import Recipe
from moc_cli.runs import RunFolder

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
PLACES = ("model.model_name_or_path", "model.tokenizer_name", "data.path")
OF_MACHINE = {*PLACES, "train.tf32", "eval.per_device_eval_batch_size"}
PROCESSES = {"launch.num_processes", "launch.num_machines"}
BATCH_KEYS = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")


def check_recipe(
    saved: dict[str, Any], current: dict[str, Any], processes: tuple[int, int] = (1, 1)
) -> list[str]:
    """Return a sentence on each harmless change of the recipe, or of the number of processes.

    `processes`: then and now. Raises RunError naming every key that makes it another run.
    """
    saved_keys, current_keys = flatten(saved), flatten(current)
    old_world, world = processes
    old_rows, new_rows = rows_a_step(saved_keys, old_world), rows_a_step(current_keys, world)
    defaults = _defaults()
    changes, refused, other_keys = [], [], False
    for key in sorted(saved_keys.keys() | current_keys.keys()):
        old, new = saved_keys.get(key), current_keys.get(key)
        if key in PATH_KEYS:  # older runs kept paths as they were typed
            old, new = absolute_value(key, old), absolute_value(key, new)
        if old == new:
            continue
        if key not in saved_keys and new == defaults.get(key):  # a key of later versions
            continue
        if key in BATCH_KEYS and old_rows == new_rows:
            continue  # see `keep_place`
        if key == "train.optim" and {old, new} == SAME_OPTIMIZERS:
            changes.append(f"{key}: {old} -> {new}; {CHANGEABLE['launch']}")
            continue
        rule = next((rule for rule in CHANGEABLE if key == rule or key.startswith(f"{rule}.")), "")
        if not rule:
            refused.append(f"{key} ({_word(old)} then, {_word(new)} now)")
            other_keys = other_keys or key not in BATCH_KEYS
        elif CHANGEABLE[rule]:
            changes.append(f"{key}: {_word(old)} -> {_word(new)}; {CHANGEABLE[rule]}")
    hint = "resume with the old values, or start another run: --output-dir OTHER"
    if old_world != world and old_rows == new_rows:
        dropout = "; dropout draws other masks" if 1 in processes else ""
        changes.append(
            f"processes: {old_world} -> {world}; {new_rows} rows a step as before{dropout}"
        )
    elif old_world != world:
        refused.append(
            f"rows a step ({old_rows} in {old_world} processes then, {new_rows} in {world} now)"
        )
        size, steps = BATCH_KEYS
        fitting, remainder = divmod(old_rows, current_keys[size] * world)
        if not remainder and not other_keys:
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
    recipe = absolute_paths(recipe)
    current = recipe.model_dump(mode="json")
    if recipe.data.custom:  # what is null was read from the rows
        written = written_out(recipe.data).model_dump(mode="json")
        current["data"] = filled(written, saved["data"])
    check_recipe(saved, current)
    changed = _changed_in_use(saved, current)
    if changed - LENGTH:
        raise RunError(
            f"{folder.path} is finished with another {', '.join(sorted(changed - LENGTH))}",
            "take the values of then, or another folder: --output-dir OTHER",
        )
    return not changed


def filled(section: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with another's values where it holds null, in sections within it too."""
    result: dict[str, Any] = {}
    for key, value in section.items():
        known = other.get(key)
        if isinstance(value, Mapping):
            result[key] = filled(value, known or {})
        else:
            result[key] = known if value is None else value
    return result


def trains_the_same(recipe: Recipe, other: Recipe) -> bool:
    """Whether two recipes differ in places and in the use of the machine alone.

    Another number of processes is another number of rows a step, and another split of them into
    micro-batches votes on other routes.
    """
    one, two = (flatten(each.model_dump(mode="json")) for each in (recipe, other))
    return all(one[key] == two.get(key) or _is_of_machine(key) for key in one)


def _is_of_machine(key: str) -> bool:
    of_machine = key.startswith(("output.", "launch.")) or key in OF_MACHINE
    return of_machine and key not in PROCESSES


def _changed_in_use(saved: dict[str, Any], current: dict[str, Any]) -> set[str]:
    """Return the keys that a resume may change, and that differ."""
    saved_keys, current_keys = flatten(saved), flatten(current)
    return {key for key in IN_USE if saved_keys.get(key) != current_keys.get(key)}


def rows_a_step(recipe: Mapping[str, Any], processes: int) -> int:
    """Rows of one optimizer step in all processes, of a recipe with dotted keys."""
    size, steps = (int(recipe[key]) for key in BATCH_KEYS)
    return size * steps * processes


@cache
def _defaults() -> dict[str, Any]:
    return {row.key: json.loads(row.default) for row in keys() if row.default}


def _word(value: Any) -> str:
    return "nothing" if value is None else str(value)
