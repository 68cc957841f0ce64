"""Recipes of runs that take a second: `moc train` with the arguments returned here."""

import json
from pathlib import Path
from typing import Any

from support.models import make_byte_tokenizer, make_pair_tokenizer, make_tiny_model
from support.rows import choice_rows, pair_rows, write_rows

from moc_cli.cli import run
from moc_cli.data.commonsense import QUESTION
from moc_cli.data.prompts import HEADER, INDENT
from moc_cli.training.log import MEASURED

MOC = {"name": "moc", "rank": 4, "gate": {"projection_dim": 8}}
# Of every prompt of `choices_run`: as tokens of one byte they would be most of a run's work.
PHRASES = (
    HEADER,
    f"{INDENT}### Instruction:\n{INDENT}",
    f"{INDENT}### Response:\n{INDENT}",
    QUESTION.rstrip(),
    "Answer format: answer1/answer2/answer3",
    "the correct answer is",
)


def save_model(folder: Path, family: str) -> None:
    """Write a tiny model, of an encoder without its head, and its tokenizer."""
    if family == "bert":
        make_tiny_model("bert", num_labels=2).base_model.save_pretrained(folder)
        make_pair_tokenizer().save_pretrained(folder)
    else:
        make_tiny_model(family).save_pretrained(folder)
        make_byte_tokenizer(PHRASES).save_pretrained(folder)


def train_on_rows(
    folder: Path, family: str, rows: list[dict], method: dict[str, Any] = MOC, **data: Any
) -> Path:
    """Train one step on rows of a file, with recipe, model, rows and run below `folder`.

    `data` are more keys of that section. Returns the run folder.
    """
    save_model(folder / "model", family)
    write_rows(folder / "rows.jsonl", rows)
    own = {"suite": "custom", "path": str(folder / "rows.jsonl"), "held_out": 6, "max_length": 32}
    recipe = {
        "model": {"model_name_or_path": str(folder / "model")},
        "method": method,
        "data": own | data,
        "train": {"max_steps": 1},
        "eval": {"before": False},
        "output": {"output_dir": str(folder / "run"), "save_strategy": "no"},
        "launch": {"device": "cpu", "num_threads": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert run(["train", str(folder / "recipe.yaml"), "--json"]) == 0
    return folder / "run"


def choices_run(folder: Path) -> list[str]:
    """Arguments of a tiny run on ARC-Easy, with its model and rows below `folder`."""
    save_model(folder / "model", "llama")
    write_rows(folder / "data" / "ARC-Easy" / "train.jsonl", choice_rows(20))
    write_rows(folder / "data" / "ARC-Easy" / "test.jsonl", choice_rows(6))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{model_name_or_path: {folder}/model}}
method: {{name: moc, rank: 4, gate: {{projection_dim: 8}}}}
data: {{suite: commonsense, tasks: [ARC-Easy], path: {folder}/data, held_out: 4,
       max_length: 400}}
train: {{max_steps: 6, per_device_train_batch_size: 3, gradient_accumulation_steps: 2,
        learning_rate: 1.0e-2}}
output: {{output_dir: {folder}/run, logging_steps: 2, save_steps: 2}}
launch: {{device: cpu, num_threads: 1}}
"""
    )
    return ["train", str(recipe)]


def pairs_run(folder: Path) -> list[str]:
    """Arguments of a tiny run on MRPC whose checkpoint lacks the classifier's head."""
    save_model(folder / "model", "bert")
    for task, labels in (("mrpc", [0, 1]), ("stsb", [0.5, 2.0, 4.5])):
        write_rows(folder / "data" / task / "train.jsonl", pair_rows(24, labels))
        write_rows(folder / "data" / task / "validation.jsonl", pair_rows(9, labels))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""
model: {{model_name_or_path: {folder}/model}}
method: {{name: moc, rank: 4, gate: {{projection_dim: 8}}}}
data: {{suite: glue, tasks: [mrpc], path: {folder}/data, max_length: 64}}
train: {{num_train_epochs: 2, per_device_train_batch_size: 8, learning_rate: 1.0e-2}}
eval: {{eval_strategy: epoch}}
output: {{output_dir: {folder}/run, logging_steps: 1}}
launch: {{device: cpu, num_threads: 1}}
"""
    )
    return ["train", str(recipe)]


def without_measured(record: dict[str, Any]) -> dict[str, Any]:
    """What two runs of the same recipe must agree on, of a line of metrics.jsonl."""
    return {key: value for key, value in record.items() if key != MEASURED}
