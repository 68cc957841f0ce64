"""For each key of the recipe: another value, and what in the run must follow it.

A key of the schema without an entry here fails tests/training/test_every_key.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from support.key_runs import KeyRun

from moc_cli.kinds import make_kind
from moc_cli.models.quantization import of_model
from moc_cli.processes import Processes
from moc_cli.recipe.methods import METHODS
from moc_cli.training.build import make_scoring_options, make_settings
from moc_cli.training.compiled import matmul_precision
from moc_cli.training.sharding import splits

See = Callable[[KeyRun], Any]
VALUE = object()  # what is seen is the value itself
OTHER = object()  # what is seen is anything but what was seen before


@dataclass(frozen=True)
class Change:
    """In the run `base` a key is set to `value`: then `see` gives `expected`, and did not before.

    `also` holds before and after, `needs` comes with the value. Where `see` gives a dictionary,
    this is so of each of its entries.
    """

    value: Any
    see: See
    expected: Any = VALUE
    base: str = "choices"
    also: dict[str, Any] = field(default_factory=dict)
    needs: dict[str, Any] = field(default_factory=dict)


def _of_optimizer(name: str) -> See:
    return lambda run: run.loop.optimizer[name]


def _of_routing(name: str) -> See:
    return lambda run: getattr(run.mixture.routing, name)


def _rates(run: KeyRun) -> list[float]:
    """The rate of each step, as a part of the highest."""
    return [round(line["lr"] / run.recipe.train.learning_rate, 4) for line in run.loop.losses]


def _first_gradient(run: KeyRun) -> float:
    """The norm of the gradient that AdamW saw in the first step, by its first moments."""
    tensors = run.loop.newest.optimizer.items()
    moments = [tensor.flatten() for name, tensor in tensors if name.endswith("exp_avg")]
    return torch.cat(moments).norm().item() / 0.1


def _of_seed(run: KeyRun) -> dict[str, Any]:
    head = next(name for name in run.state if name.endswith("classifier.weight"))
    return {
        "controls": run.state["controls.0.attn.A"].tolist(),
        "gate": run.state["gates.shared.projection"].tolist(),
        "head": run.state[head].tolist(),
        "order": run.rows.data.batches.epoch(0),
        "dropout": run.loop.state["head.weight"].tolist(),
    }


def _loaded_with(name: str) -> See:
    """An argument with which the model and the tokenizer are loaded."""
    return lambda run: {part: call.kwargs[name] for part, call in run.calls.items()}


def _kept(run: KeyRun) -> str:
    """How the loaded base keeps its linear weights."""
    return str(of_model(run.adapted.model))


def _order(run: KeyRun) -> list[list[int]]:
    batches: list[list[int]] = run.rows.data.batches.epoch(0)
    return batches


def _holds(text: str) -> See:
    return lambda run: text in str(run.splits.all_examples)


def _class_of(text: str) -> See:
    return lambda run: {row.text_a: row.label for row in run.splits.all_examples}[text]


def _rows(part: str) -> See:
    """The number of rows to train on, to watch, or to score."""

    def count(run: KeyRun) -> int:
        scored = [row for rows in run.splits.tests.values() for row in rows]
        return len({"train": run.splits.train, "scored": scored}.get(part, run.splits.validation))

    return count


def _in_format(name: str) -> dict[str, Any]:
    return {"data.format": name}


def _max_lengths(run: KeyRun) -> dict[str, int]:
    scored = make_scoring_options(run.recipe).max_length
    return {"rows": max(run.rows.encoded.lengths), "scoring": scored}


def _scored_before(run: KeyRun) -> bool:
    score = run.finished["tasks"]["ARC-Easy"]["metrics"]["accuracy"]
    return score.get("before") is not None


def _for_task(run: KeyRun) -> dict[str, Any]:
    return {
        "train": run.loop.losses[0]["lr"] == 0.002,
        "eval": len(run.splits.tests["ARC-Easy"]) == 3,
    }


def _files(run: KeyRun) -> bool:
    return bool(run.finished) and Path("elsewhere/results.json").is_file()


def _checkpoints_kept(run: KeyRun) -> int:
    assert run.finished
    return len(list((run.folder / "run" / "checkpoints").iterdir()))


def _recomputed(run: KeyRun) -> dict[str, bool]:
    """What the model does, and what the loop says of it where memory is short."""
    return {
        "model": run.adapted.model.is_gradient_checkpointing,
        "loop": make_settings(run.recipe).activation_checkpointing == "full",
    }


def _trackers(run: KeyRun) -> dict[str, Any]:
    return {"asked": run.accelerator["log_with"] == ["wandb"], "fed": run.tracked > 0}


CHAT = {"data.format": "chat", "data.columns.messages": "other_messages"}
QUOTED = {"data.path": "quoted.csv", "data.format": "text"}
NF4 = {"model.load_in_4bit": True}
STEPS = {"train.max_steps": 6, "output.logging_steps": 1}
EPOCHS = {"eval.eval_strategy": "epoch"}
SHORT = {"train.max_steps": 3, "eval.max_samples": 1, "data.max_train_samples": 2}
MACHINES = {"launch.num_machines": 2, "launch.main_process_ip": "10.0.0.1"}
WARM = [0, 0.5, 1, 0.75, 0.5, 0.25]

OTHERS = {
    "seed": Change(7, _of_seed, OTHER, "pairs"),
    "model.model_name_or_path": Change(
        "other", lambda run: run.adapted.model.get_input_embeddings().weight[5].tolist(), OTHER
    ),
    "model.revision": Change("v2", _loaded_with("revision")),
    "model.tokenizer_name": Change("bert", lambda run: run.tokenizer("a").input_ids, OTHER),
    "model.attn_implementation": Change(
        "eager", lambda run: run.adapted.model.config._attn_implementation
    ),
    "model.load_in_4bit": Change(True, _kept, "4-bit nf4, doubly quantised"),
    "model.load_in_8bit": Change(True, _kept, "8-bit"),
    "model.bnb_4bit_quant_type": Change("fp4", _kept, "4-bit fp4, doubly quantised", also=NF4),
    "model.bnb_4bit_use_double_quant": Change(False, _kept, "4-bit nf4", also=NF4),
    "model.trust_remote_code": Change(True, _loaded_with("trust_remote_code")),
    "data.suite": Change(
        "glue",
        lambda run: type(make_kind(run.recipe.data.task)).__name__,
        "Pairs",
        needs={"data.tasks": ["mrpc"]},
    ),
    "data.tasks": Change(["ARC-Easy", "ARC-Challenge"], lambda run: list(run.splits.tests)),
    "data.path": Change("other-data", lambda run: len(run.splits.train), 12),
    "data.format": Change(
        "text", lambda run: type(run.splits.train[0]).__name__, "TextExample", "own"
    ),
    "data.train": Change("parts/fit.jsonl", _rows("train"), 5, "parts"),
    "data.validation": Change("parts/watch.jsonl", _rows("validation"), 6, "parts"),
    "data.test": Change("parts/score.jsonl", _rows("scored"), 7, "parts"),
    "data.config_name": Change("more", _rows("train"), 4, "parts"),
    "data.splits.train": Change("fit", _rows("train"), 5, "parts"),
    "data.splits.validation": Change("watch", _rows("validation"), 6, "parts"),
    "data.splits.test": Change("score", _rows("scored"), 7, "parts"),
    "data.quoting": Change("none", _holds('"one 3"'), True, "own", also=QUOTED),
    "data.columns.text": Change("other_text", _holds("b 3"), True, "own", also=_in_format("text")),
    "data.columns.text_pair": Change(
        "other_pair", _holds("d 3"), True, "own", also=_in_format("classification")
    ),
    "data.columns.label": Change(
        "other_label", _class_of("a 3"), 0, "own", also=_in_format("classification")
    ),
    "data.columns.instruction": Change("other_instruction", _holds("write 3"), True, "own"),
    "data.columns.input": Change("other_input", _holds("at 3"), True, "own"),
    "data.columns.output": Change("other_output", _holds("down 3"), True, "own"),
    "data.columns.messages": Change(
        "other_messages", _holds("x 3"), True, "own", also=_in_format("chat")
    ),
    "data.chat_template": Change(
        "chatml", lambda run: "<|im_start|>" in run.first_text, True, "own", also=CHAT
    ),
    "data.template": Change(
        "chat",
        lambda run: run.first_text.startswith("user: "),
        True,
        "own",
    ),
    "data.chat_turns": Change(
        "split", lambda run: len(run.rows.encoded.rows), 16, "own", also=CHAT
    ),
    "data.merge_system": Change(
        True, lambda run: "system: be brief" in run.first_text, False, "own", also=CHAT
    ),
    "data.labels": Change([1, 0], _class_of("a 3"), 0, "own", also=_in_format("classification")),
    "data.max_length": Change(8, _max_lengths, base="pairs"),
    "data.train_on_inputs": Change(
        False, lambda run: run.rows.encoded.rows[0]["labels"][1] != -100
    ),
    "data.max_train_samples": Change(5, lambda run: len(run.splits.train)),
    "data.max_eval_samples": Change(2, lambda run: len(run.splits.validation)),
    "data.held_out": Change(7, lambda run: len(run.splits.validation)),
    "data.eval_split": Change(
        "held_out", _rows("validation"), 7, "pairs", also={"data.held_out": 7}
    ),
    "train.num_train_epochs": Change(2, lambda run: run.loop.outcome.counters.epoch),
    "train.max_steps": Change(4, lambda run: run.loop.outcome.counters.step),
    "train.per_device_train_batch_size": Change(5, lambda run: max(map(len, _order(run)))),
    "train.gradient_accumulation_steps": Change(2, lambda run: 1 / run.loop.scales[0]),
    "train.optim": Change("adamw_8bit", lambda run: run.loop.optimizer_name, "AdamW8bit"),
    "train.learning_rate": Change(0.002, lambda run: run.loop.losses[0]["lr"], also=STEPS),
    "train.weight_decay": Change(0.3, _of_optimizer("weight_decay")),
    "train.adam_beta1": Change(0.7, lambda run: run.loop.optimizer["betas"][0]),
    "train.adam_beta2": Change(0.8, lambda run: run.loop.optimizer["betas"][1]),
    "train.adam_epsilon": Change(1e-3, _of_optimizer("eps")),
    "train.max_grad_norm": Change(0.01, _first_gradient, also={"train.max_steps": 1}),
    "train.lr_scheduler_type": Change("constant", _rates, [1.0] * 6, also=STEPS),
    "train.warmup_steps": Change(2, _rates, WARM, also=STEPS),
    "train.warmup_ratio": Change(1 / 3, _rates, WARM, also=STEPS),
    "train.bf16": Change(True, lambda run: run.adapted.model.dtype == torch.bfloat16),
    "train.tf32": Change(
        False,
        lambda run: matmul_precision(torch.device("cuda"), tf32=run.recipe.train.tf32),
        "highest",
    ),
    "train.torch_compile": Change(True, lambda run: make_settings(run.recipe).torch_compile, True),
    "train.activation_checkpointing": Change("full", _recomputed, True),
    "train.gradient_checkpointing": Change(True, _recomputed),
    "train.group_by_length": Change(
        False, _order, OTHER, also={"train.per_device_train_batch_size": 3}
    ),
    "train.packing": Change(True, lambda run: len(run.rows.data.collate([0, 1])["input_ids"]) == 1),
    "train.modules": Change(
        ["bert.pooler"], lambda run: any("pooler" in name for name in run.state), True, "pairs"
    ),
    "eval.too_long": Change("refuse", lambda run: make_scoring_options(run.recipe).too_long),
    "eval.per_device_eval_batch_size": Change(
        3, lambda run: make_scoring_options(run.recipe).batch_size
    ),
    "eval.eval_strategy": Change("epoch", lambda run: run.loop.evaluations, [5, 10, 15]),
    "eval.eval_steps": Change(
        6,
        lambda run: run.loop.evaluations,
        [6, 12, 15],
        also={"eval.eval_strategy": "steps", "eval.eval_steps": 4},
    ),
    "eval.metric_for_best_model": Change(
        "f1", lambda run: run.loop.newest.counters.best_step, 10, "pairs", also=EPOCHS
    ),
    "eval.early_stopping_patience": Change(
        1, lambda run: run.loop.outcome.stopped, "early", also=EPOCHS
    ),
    "eval.protocol": Change("generate", lambda run: make_scoring_options(run.recipe).protocol),
    "eval.torch_compile": Change(
        True,
        lambda run: make_scoring_options(run.recipe).torch_compile,
        True,
        also={"eval.protocol": "generate"},
    ),
    "eval.before": Change(False, _scored_before, also=SHORT),
    "eval.max_samples": Change(3, lambda run: len(run.splits.tests["ARC-Easy"])),
    "output.output_dir": Change("elsewhere", _files, True, also=SHORT),
    "output.save_strategy": Change("epoch", lambda run: run.loop.checkpoints, [5, 10, 15]),
    "output.save_steps": Change(4, lambda run: run.loop.checkpoints, [4, 8, 12, 15]),
    "output.save_total_limit": Change(1, _checkpoints_kept, also={**SHORT, "output.save_steps": 1}),
    "output.logging_steps": Change(
        4, lambda run: [line["step"] for line in run.loop.losses], [4, 8, 12, 15]
    ),
    "output.report_to": Change(["wandb"], _trackers, True, also=SHORT),
    "launch.device": Change("cuda", lambda run: run.accelerator["cpu"], False),
    "launch.num_threads": Change(2, lambda run: run.job.identity["threads"]),
    "launch.num_processes": Change(2, lambda run: run.launcher.num_processes),
    "launch.num_machines": Change(
        2, lambda run: run.launcher.num_machines, needs={"launch.main_process_ip": "10.0.0.1"}
    ),
    "launch.machine_rank": Change(1, lambda run: run.launcher.machine_rank, also=MACHINES),
    "launch.main_process_ip": Change("10.0.0.2", lambda run: run.launcher.main_process_ip),
    "launch.main_process_port": Change(29511, lambda run: run.launcher.main_process_port),
    "launch.strategy": Change(
        "fsdp2", lambda run: splits(run.recipe.launch, Processes(world=2)), True
    ),
    "launch.ddp_timeout": Change(60, lambda run: run.joined["seconds"]),
    "per_task": Change(
        {"ARC-Easy": {"train": {"learning_rate": 0.002}, "eval": {"max_samples": 3}}},
        _for_task,
        True,
        also=STEPS,
    ),
}

# Rows of other suites are read by code of their own.
ELSEWHERE: list[tuple[str, Change]] = [
    ("data.held_out", Change(7, _rows("validation"), base="own")),
    ("data.max_train_samples", Change(5, _rows("train"), base="own")),
    ("data.max_eval_samples", Change(2, _rows("validation"), base="own")),
    ("data.max_eval_samples", Change(2, _rows("validation"), base="pairs")),
    ("eval.max_samples", Change(3, _rows("scored"), base="own")),
    (
        "eval.eval_strategy",
        Change("epoch", _rows("validation"), 4, "own", also={"data.test": "parts/score.jsonl"}),
    ),
]

# The section `method`.

PARTS = {
    "moc": {"A", "B", "projection", "experts", "log_temperature"},
    "control": {"A", "B"},
    "lora": {"lora_A", "lora_B"},
    "dora": {"lora_A", "lora_B", "lora_magnitude_vector"},
    "molex": {"lora_A", "lora_B", "projection", "experts", "log_temperature"},
}
LLAMA = {
    "layers": "layers",
    "attn": {"read": "input_layernorm", "write": "self_attn"},
    "ffn": {"read": "post_attention_layernorm", "write": "mlp"},
    "causal": True,
}
SWAPPED = LLAMA | {"attn": LLAMA["ffn"], "ffn": LLAMA["attn"]}


def _parts(run: KeyRun) -> set[str]:
    return {name.removesuffix(".weight").rsplit(".", 1)[-1] for name in run.state}


def _sites(run: KeyRun) -> str:
    return "+".join(dict.fromkeys(site.block for site in run.mixture.sites))


def _gate(run: KeyRun) -> Any:
    return next(iter(run.mixture.gates.values()))


def _gate_kind(run: KeyRun) -> str:
    return type(_gate(run)).__name__


def _projection(run: KeyRun) -> int:
    size: int = _gate(run).projection.shape[0]
    return size


def _control_changes(method: str) -> dict[str, Change]:
    """The keys of `moc` and `control`; placements are seen in the logits."""
    also = {"method": method}
    placed = {"method": {"name": method, "placement": LLAMA}}
    changes = {
        "rank": Change(6, lambda run: run.state["controls.0.attn.A"].shape[0], also=also),
        "scale": Change(0.3, lambda run: run.mixture.scale, also=also),
        "sites": Change("ffn", _sites, also=also),
        "placement": Change(SWAPPED, lambda run: run.logits.tolist(), OTHER, also=also),
        "placement.layers": Change("blocks", lambda run: run.refusal, OTHER, also=placed),
        "placement.causal": Change(False, lambda run: run.keeps_routes, also=placed),
        "placement.multiplier": Change(
            "initializer_range", lambda run: run.mixture.scale, 1 / 0.2, also=placed
        ),
    }
    for end, path in {
        "attn.read": "self_attn",
        "attn.write": "input_layernorm",
        "ffn.read": "mlp",
        "ffn.write": "post_attention_layernorm",
    }.items():
        changes[f"placement.{end}"] = Change(
            path, lambda run: run.logits.tolist(), OTHER, also=placed
        )
    return changes


def _low_rank_changes(method: str) -> dict[str, Change]:
    """The keys of the methods that peft's LoRA is in."""
    also = {"method": method}
    return {
        "rank": Change(4, lambda run: run.lora.lora_A["default"].weight.shape[0], also=also),
        "alpha": Change(8, lambda run: run.lora.scaling["default"] * 32, also=also),
        "dropout": Change(0.2, lambda run: run.lora.lora_dropout["default"].p, also=also),
        "targets": Change(["o_proj"], lambda run: run.adapted_modules, {"o_proj"}, also=also),
    }


def _moc_changes() -> dict[str, Change]:
    """The keys of `moc` alone."""
    also = {"method": "moc"}
    routing = {
        "alpha": 0.6,
        "top_k": 2,
        "gate.estimator": "probability",
        "routing.level": "sample",
        "routing.vote": "mode",
        "routing.exclude_local": True,
        "routing.decode": "running",
        "routing.sync": True,
    }
    balance = {"weight": 0.3, "f": "choice", "reduce": "mean"}
    changes = {
        key: Change(value, _of_routing(key.rsplit(".", 1)[-1]), also=also)
        for key, value in routing.items()
    }
    changes |= {
        f"balance.{key}": Change(value, _of_routing(f"balance_{key}"), also=also)
        for key, value in balance.items()
    }
    return (
        changes
        | {
            "share_gate": Change(
                False, lambda run: list(run.mixture.gates), ["attn", "ffn"], also=also
            ),
        }
        | _gate_changes("moc")
    )


def _gate_changes(method: str) -> dict[str, Change]:
    also = {"method": method}
    return {
        "gate.kind": Change("linear", _gate_kind, "LinearGate", also=also),
        "gate.projection_dim": Change(8, _projection, also=also),
        "gate.learning_rate": Change(
            0.002, lambda run: make_settings(run.recipe).gate_learning_rate, also=also
        ),
    }


def _mixing_layers(run: KeyRun) -> list[str]:
    run.adapted.model(torch.tensor([[5, 6, 7, 8]]))
    return list(run.adapted.routes())


def _molex_changes() -> dict[str, Change]:
    """The keys of `molex` that are not those of its LoRA."""
    also = {"method": "molex"}
    return {
        "weight": Change(0.7, lambda run: run.mixture.weight, also=also),
        "weight_start": Change(
            0.6,
            lambda run: run.mixture.weight_logits.softmax(dim=0)[0].item(),
            also={"method": {"name": "molex", "weight": "learned"}},
        ),
        "vote": Change("mode", lambda run: run.mixture.vote, also=also),
        "mixed_layers": Change([0], _mixing_layers, ["0"], also=also),
        "gate.bias": Change(True, lambda run: "bias" in _parts(run), also=also),
        "balance.weight": Change(0.3, lambda run: run.mixture.balance_weight, also=also),
    } | _gate_changes("molex")


def _init(method: str) -> dict[str, Change]:
    see: See = lambda run: run.lora.lora_A["default"].weight.tolist()  # noqa: E731
    return {"init": Change("gaussian", see, OTHER, also={"method": method})}


def _name(method: str) -> Change:
    before = "control" if method == "moc" else "moc"
    return Change(method, _parts, PARTS[method], also={"method": before})


OF_METHOD = {
    "moc": _control_changes("moc") | _moc_changes(),
    "control": _control_changes("control"),
    "lora": _low_rank_changes("lora") | _init("lora"),
    "dora": _low_rank_changes("dora") | _init("dora"),
    "molex": _low_rank_changes("molex") | _molex_changes(),
}
# (method or "", dotted key) -> its change
CHANGES: dict[tuple[str, str], Change] = {("", key): change for key, change in OTHERS.items()}
for _method in METHODS:
    CHANGES[_method, "method.name"] = _name(_method)
    for _key, _change in OF_METHOD.get(_method, {}).items():
        CHANGES[_method, f"method.{_key}"] = _change
