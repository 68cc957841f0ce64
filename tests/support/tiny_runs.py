"""Recipes of runs that take a second: `moc train` with the arguments returned here."""

from pathlib import Path

from support.models import make_byte_tokenizer, make_pair_tokenizer, make_tiny_model
from support.rows import choice_rows, pair_rows, write_rows


def choices_run(folder: Path) -> list[str]:
    """Arguments of a tiny run on ARC-Easy, with its model and rows below `folder`."""
    make_tiny_model("llama").save_pretrained(folder / "model")
    make_byte_tokenizer().save_pretrained(folder / "model")
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
    make_tiny_model("bert", num_labels=2).base_model.save_pretrained(folder / "model")
    make_pair_tokenizer().save_pretrained(folder / "model")
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
