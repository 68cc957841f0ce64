"""Defaults of the recipe against the specification and the libraries that it follows."""

import json

import pytest

from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.reference import keys

UPDATE = {"method.alpha": 0.95, "method.top_k": 1, "method.scale": 1.0, "method.rank": 64}
GATE = {"method.gate.kind": "cosine", "method.gate.projection_dim": 256}
VOTE = {
    "method.routing.level": "batch",
    "method.routing.vote": "mean",
    "method.routing.exclude_local": False,
    "method.routing.decode": "frozen",
    "method.routing.sync": False,
    "method.gate.estimator": "renormalized",
}
BALANCE = {"method.balance.weight": 0.01, "method.balance.reduce": "sum"}
# DoRA's protocol, by the paper's shares of parameters.
LORA = {"method.rank": 32, "method.alpha": 64, "method.dropout": 0.05}
TRAINING = {
    # Table 5 of the paper
    "train.learning_rate": 3e-4,
    "train.weight_decay": 0.01,
    "train.num_train_epochs": 3.0,
    "train.per_device_train_batch_size": 16,
    "data.max_length": 256,
    # LLM-Adapters' protocol
    "data.train_on_inputs": True,
    # ours, as the protocol has no rows to watch
    "data.held_out": 120,
    "data.eval_split": "validation",
    "eval.torch_compile": False,
    # Hugging Face's TrainingArguments
    "train.adam_beta1": 0.9,
    "train.adam_beta2": 0.999,
    "train.adam_epsilon": 1e-8,
    "train.max_grad_norm": 1.0,
    "train.torch_compile": False,
    # TF32 turns no vote of real weights, and is faster
    "train.tf32": True,
    "launch.ddp_timeout": 1800,
    # accelerate
    "launch.num_machines": 1,
    "launch.machine_rank": 0,
    # TRL's SFTConfig
    "train.packing": False,
}


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("moc", UPDATE | GATE | VOTE | BALANCE),
        ("lora", LORA),
        ("dora", LORA),
        ("molex", LORA | {"method.weight": 0.95, "method.balance.weight": 0.01}),
        ("", TRAINING),
    ],
)
def test_defaults_are_those_of_the_specification(method: str, expected: dict) -> None:
    written = {key.key: key.default for key in keys() if key.method == method}
    assert {key: json.loads(written[key]) for key in expected} == expected


@pytest.mark.parametrize(
    "model", ["llama2-7b", "llama3-8b", "mistral-7b-instruct-v0.3", "qwen2.5-14b-instruct"]
)
def test_decoders_warm_up_for_100_steps(model: str) -> None:
    train = load_recipe(f"commonsense/{model}/moc").train
    assert (train.warmup_steps, train.lr_scheduler_type) == (100, "linear")
