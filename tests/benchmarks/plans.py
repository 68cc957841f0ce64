"""Planned memory of a training step of the paper's models beside its targets, in GB.

    python tests/benchmarks/plans.py [--only llama2-7b]
    python tests/benchmarks/plans.py --data FOLDER --tokenizer FOLDER

16 rows of 256 tokens a micro-batch; no weights and no GPU. A step is what torch allocates at most,
without CUDA's context. With `--data`, the folder of the commonsense rows, the rows have the lengths
that a tokenizer gives them, and what packing saves is shown.
"""

import argparse
import json
from collections.abc import Iterator

from moc_cli.planning.batches import Rows, read_rows
from moc_cli.planning.plans import Plan, Planner
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build

MODE = "train.activation_checkpointing="
TARGETS: list[tuple[str, list[str], float | None]] = [
    ("llama2-7b", [f"{MODE}none"], 33.8),
    ("llama2-7b", [f"{MODE}selective"], 29.0),
    ("llama2-7b", [f"{MODE}full"], 16.1),
    ("llama2-7b", [f"{MODE}offload"], 15.2),
    ("llama2-7b", [f"{MODE}none", "method=control"], None),
    ("llama2-7b", [f"{MODE}none", "method=lora"], None),
    ("llama2-7b", [f"{MODE}none", "method.top_k=7"], None),
    ("llama3-8b", [f"{MODE}full"], 18.5),
    ("llama3-8b", [f"{MODE}full", "model.load_in_4bit=true", "train.optim=adamw_8bit"], 8.0),
]
COMMONSENSE = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande")
MIX = f"data.tasks=[{', '.join(COMMONSENSE)}, ARC-Easy, ARC-Challenge, openbookqa]"
OWN_LENGTHS: list[tuple[list[str], float | None]] = [
    (["train.group_by_length=false"], None),
    (["train.packing=true"], None),
    (["train.packing=true", "train.group_by_length=false"], None),
    (["train.packing=true", "train.group_by_length=even"], 24.0),
]


def recipe_of(model: str, changes: list[str]) -> Recipe:
    """The recipe of one of the paper's models, 16 rows of at most 256 tokens a step."""
    sizes = ["train.per_device_train_batch_size=16", "data.max_length=256"]
    return load_recipe(
        f"commonsense/{model}/moc", [*sizes, "train.gradient_accumulation_steps=1", *changes]
    )


def commonsense_rows(data: str, tokenizer: str) -> Rows:
    """The commonsense rows of a folder as a tokenizer cuts them; a small model stands for any."""
    source = [MIX, f"data.path={data}", f"model.tokenizer_name={tokenizer}", "eval.max_samples=50"]
    recipe = recipe_of("smollm2-135m", source)
    return read_rows(recipe, build.base_shape(recipe))[0]


def at_own_lengths(data: str, tokenizer: str) -> Iterator[tuple[Plan, float | None]]:
    """Plans of LLaMA2-7B with the commonsense rows, padded and packed."""
    planner = Planner(None, commonsense_rows(data, tokenizer))
    for changes, target in OWN_LENGTHS:
        recipe = recipe_of("llama2-7b", [f"{MODE}none", *changes])
        yield planner.plan(recipe, changes, all_layers=True), target


def show(plan: Plan, model: str, changes: list[str], target: float | None) -> None:
    parts = {part: round(size / 1e9, 2) for part, size in plan.parts.items()}
    line = {"model": model, "changes": changes, "step": round(plan.step_bytes / 1e9, 2)}
    print(json.dumps(line | {"target": target, "parts": parts}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one model of those above")
    parser.add_argument("--data", help="folder of the commonsense rows")
    parser.add_argument("--tokenizer", help="folder of a tokenizer for these rows")
    given = parser.parse_args()
    if given.data is not None:
        for plan, target in at_own_lengths(given.data, given.tokenizer):
            show(plan, "llama2-7b", list(plan.changes), target)
        return
    planner = Planner(None, Rows(None))
    for model, changes, target in TARGETS:
        if given.only in (None, model):
            show(planner.plan(recipe_of(model, changes), all_layers=True), model, changes, target)


if __name__ == "__main__":
    main()
