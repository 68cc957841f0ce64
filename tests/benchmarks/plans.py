"""Planned memory of a training step of the paper's models beside its targets, in GB.

    python tests/benchmarks/plans.py [--only llama2-7b]

16 rows of 256 tokens a micro-batch; no weights and no GPU. A step is what torch allocates at most,
without CUDA's context.
"""

import argparse
import json

from moc_cli.planning.batches import Rows
from moc_cli.planning.plans import Planner
from moc_cli.recipe.load import load_recipe

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="one model of those above")
    only = parser.parse_args().only
    planner = Planner(None, Rows(None))
    for model, changes, target in TARGETS:
        if only in (None, model):
            sizes = ["train.per_device_train_batch_size=16", "data.max_length=256"]
            once = "train.gradient_accumulation_steps=1"
            recipe = load_recipe(f"commonsense/{model}/moc", [*sizes, once, *changes])
            plan = planner.plan(recipe, whole=True)
            parts = {part: round(size / 1e9, 2) for part, size in plan.parts.items()}
            line = {"model": model, "changes": changes, "step": round(plan.step_bytes / 1e9, 2)}
            print(json.dumps(line | {"target": target, "parts": parts}), flush=True)


if __name__ == "__main__":
    main()
