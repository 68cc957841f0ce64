"""Which run a checkpoint belongs to, and what may change when it is resumed."""

from collections.abc import Callable, Mapping
from typing import Any

from moc_cli.errors import RunError
from moc_cli.models.fingerprint import find_differences, hash_tensors, list_differences
from moc_cli.models.load import known_hash
from moc_cli.recipe.paths import PATH_KEYS, absolute_path
from moc_cli.recipe.sections import FORMER, ModelSection
from moc_cli.runs import RunFolder
from moc_cli.training.build import Built

History = list[dict[str, Any]]  # of environment.json
Scores = dict[str, dict[str, float]]  # task -> metric -> value

# Key or section -> what the user is warned of when it changed; "" where no warning is needed.
CHANGEABLE = {
    "output": "",
    "launch": "results may differ in their last bits",
    "model.model_name_or_path": "the same weights in another place",
    "model.tokenizer_name": "the same vocabulary in another place",
    "data.path": "",
    "train.num_train_epochs": "the rate follows the new number of steps",
    "train.max_steps": "the rate follows the new number of steps",
    "train.learning_rate": "from this step on",
    "train.max_grad_norm": "from this step on",
    "train.gradient_checkpointing": "",
    "eval.per_device_eval_batch_size": "",
    "eval.eval_strategy": "from this step on",
    "eval.eval_steps": "from this step on",
    "eval.early_stopping_patience": "from this step on",
    "eval.before": "",
}
FACTS = {
    "vocabulary": "the tokenizer's vocabulary",
    "data": "the rows",
    "trainables": "what is trained",
}


def make_identity(
    recipe: dict[str, Any],
    *,
    weights: str,
    vocabulary: str,
    data: dict[str, Any],
    trainables: dict[str, list[int]],
    threads: int,
) -> dict[str, Any]:
    """Return what a checkpoint says about its run: the recipe and hashes of what it stands for."""
    return {
        "recipe": recipe,
        "weights": weights,
        "vocabulary": vocabulary,
        "data": data,
        "trainables": trainables,
        "threads": threads,
    }


def check_recipe(saved: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return a sentence on each harmless change of the recipe.

    Raises RunError naming every key that makes it another run.
    """
    before, after = _flat(saved), _flat(wanted)
    changes, refused = [], []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if key in PATH_KEYS:  # older runs kept paths as they were typed
            old, new = absolute_path(old), absolute_path(new)
        if old == new or key in FORMER and new is None and old == FORMER[key]:
            continue
        rule = next((rule for rule in CHANGEABLE if key == rule or key.startswith(f"{rule}.")), "")
        if not rule:
            refused.append(f"{key} ({_word(old)} then, {_word(new)} now)")
        elif CHANGEABLE[rule]:
            changes.append(f"{key}: {_word(old)} -> {_word(new)}; {CHANGEABLE[rule]}")
    if refused:
        raise RunError(
            f"the recipe is not the one this run was started with: {', '.join(refused)}",
            "resume with the old values, or start another run: --output-dir OTHER",
        )
    return changes


def check_weights(
    saved: dict[str, Any], model: ModelSection, built: Built, then: Mapping[str, str]
) -> None:
    """Raise RunError where the base's weights are not those of the checkpoint.

    `then` describes the base's tensors as the run folder knows them. Older checkpoints hold the
    hash of the weight files instead of the tensors'.
    """
    wanted = saved.get("weights")
    if wanted in (None, built.weights_hash):
        return
    if hash_tensors(then) == wanted:
        what = f":\n{list_differences(find_differences(then, built.tensors))}"
    elif known_hash(model.model_name_or_path, model.revision) == wanted:
        return
    else:
        what = ""
    raise RunError(
        f"the weights of the base model {built.name} changed since the checkpoint was written"
        + what,
        "name the folder of the old base with --base-path DIR, or start another run: "
        "--output-dir OTHER",
    )


def check_facts(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a sentence when the number of threads changed.

    Raises RunError when vocabulary, rows or trainables are not those of the checkpoint. What an
    older checkpoint does not say is not compared.
    """
    changed = [name for key, name in FACTS.items() if key in saved and saved[key] != now.get(key)]
    if changed:
        raise RunError(
            f"{' and '.join(changed)} changed since the checkpoint was written",
            "bring back the old files, or start another run: --output-dir OTHER",
        )
    if saved.get("threads") != now.get("threads"):
        return [
            f"threads: {saved.get('threads')} -> {now.get('threads')}; "
            "results may differ in their last bits"
        ]
    return []


def known_of(folder: RunFolder, warn: Callable[[str], None]) -> tuple[History, Scores]:
    """Return when a run was started and resumed, and the untrained model's scores.

    What is damaged is passed over with a sentence to `warn`: it is written anew.
    """
    history: History = []
    scores: Scores = {}
    try:
        history = folder.read_history()
    except RunError as error:
        warn(f"{error.message}; it is written anew")
    try:
        scores = folder.read_scores_before()
    except RunError as error:
        warn(f"{error.message}; it is written anew")
    return history, scores


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested sections as dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _word(value: Any) -> str:
    return "nothing" if value is None else str(value)
