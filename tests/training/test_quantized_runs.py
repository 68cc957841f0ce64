"""Runs over a base in 4 bits, from the training to the export, on a CPU."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.machine import share_of_the_cores
from support.messages import refused, warned
from support.tiny_runs import choices_run

from moc_cli import load_controls
from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.export import card
from moc_cli.export.card import base_code
from moc_cli.export.session import ExportOptions, export_run
from moc_cli.export.unquantized import open_for
from moc_cli.load_run import open_run
from moc_cli.models.load import load_model, load_tokenizer
from moc_cli.recipe.quantization import Quantization
from moc_cli.runs import BaseOptions
from moc_cli.training import build

NF4 = Quantization(load_in_4bit=True)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
SHORT = [
    *("--set", "train.max_steps=4", "--set", "train.gradient_accumulation_steps=1"),
    *("--set", "eval.max_samples=2", "--set", "train.optim=adamw_8bit"),
]
FOUR = ["--set", "model.load_in_4bit=true"]


@pytest.fixture(scope="module")
def call(tmp_path_factory) -> list[str]:
    return [*choices_run(tmp_path_factory.mktemp("quantized")), *SHORT]


@pytest.fixture(scope="module")
def home(call) -> Path:
    return Path(call[1]).parent


@pytest.fixture(scope="module")
def small(call, home) -> Path:
    """A run over the base in 4 bits."""
    folder = home / "small"
    assert run([*call, *FOUR, "--json", "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def packed(home) -> Path:
    """The folder of the base in 4 bits."""
    folder = home / "packed"
    shutil.copytree(home / "model", folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    base = load_model(str(home / "model"), kind="causal", quantization=NF4)
    base.model.save_pretrained(folder)
    return folder


def trainables(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "controls" / "adapter_model.safetensors")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_true_parameters_and_the_bytes_in_memory_are_counted(small, home) -> None:
    results = json.loads((small / "results.json").read_text())
    whole = load_model(str(home / "model"), kind="causal").model
    sizes = [parameter.numel() for parameter in whole.parameters()]
    assert results["parameters"]["base"] == sum(sizes)
    assert results["memory"]["weights"] < 3.2 * sum(sizes)  # the rest stays in float32
    environment = json.loads((small / "environment.json").read_text())
    config = json.loads((small / "controls" / "adapter_config.json").read_text())
    assert environment["model"]["weights_sha256"] == config["base_weights_sha256"]
    assert config["base_quantization"] == NF4.arguments


def test_the_line_on_the_base_says_how_it_is_kept(call, home, capsys) -> None:
    arguments = ["--set", "train.max_steps=1", "--set", "eval.before=false"]
    assert run([*call, *FOUR, *arguments, "--output-dir", str(home / "said")]) == 0
    said = capsys.readouterr().err
    line = next(line for line in said.splitlines() if line.startswith("model "))
    assert "frozen weights in 4-bit nf4, doubly quantised, " in line
    assert "kB with what stays in float32" in line


def test_a_run_loads_as_it_was_trained(small, capsys) -> None:
    opened = open_run(small)
    assert opened.quantization == NF4
    assert torch.equal(logits(opened.adapted.model), logits(open_run(small).adapted.model))
    assert "trained on a base" not in capsys.readouterr().err
    assert run(["eval", str(small), "--limit", "2", "--json"]) == 0
    scored = json.loads((small / "eval" / "rank-limit-2" / "results.json").read_text())
    assert scored["quantization"] == str(NF4)


def test_commands_load_the_base_in_another_form_on_request(small, packed, home, capsys) -> None:
    out = ["--limit", "2", "--json", "--output-dir", str(home / "scores")]
    assert run(["eval", str(small), "--no-load-in-4bit", *out]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["quantization"] is None
    assert "trained on a base with 4-bit nf4, doubly quantised weights, and here they " in said.err
    plain = [str(home / "model"), "--load-in-4bit", "--suite", "commonsense", "--tasks", "ARC-Easy"]
    assert run(["eval", "--model", *plain, "--path", str(home / "data"), *out]) == 0
    assert json.loads(capsys.readouterr().out)["quantization"] == str(NF4)
    with refused(MocError):
        open_run(small, base=BaseOptions(path=packed, load_in_4bit=False))


def test_resumed_equals_uninterrupted(call, small, home) -> None:
    """With the moments of AdamW in 8 bits."""
    folder = home / "resumed"
    shutil.copytree(small, folder)
    for name in ("controls", "checkpoints/step-000004"):
        shutil.rmtree(folder / name)
    arguments = [*call, "--output-dir", str(folder), "--resume", "auto"]
    assert run([*arguments, *FOUR]) == 0
    whole, resumed = trainables(small), trainables(folder)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_another_quantisation_is_not_resumed(call, small, packed, capsys) -> None:
    arguments = [*call, "--output-dir", str(small), "--resume", "auto"]
    assert run(arguments) == 2
    assert "model.load_in_4bit (True then, False now)" in capsys.readouterr().err
    assert run([*arguments, *FOUR, "--base-path", str(packed)]) == 2
    assert "the weights of the base model" in capsys.readouterr().err


def test_a_run_loads_on_its_base_in_another_form(call, small, packed, home, capsys) -> None:
    expected = logits(open_run(small).adapted.model)
    capsys.readouterr()
    moved = open_run(small, base=BaseOptions(path=packed))
    assert torch.equal(logits(moved.adapted.model), expected)
    assert "trained on a base" not in capsys.readouterr().err  # it is the same 4-bit type
    folder = home / "on-packed"
    name = f"model.model_name_or_path={packed}"
    assert run([*call, "--set", name, "--json", "--output-dir", str(folder)]) == 0
    capsys.readouterr()
    whole = open_run(folder, base=BaseOptions(path=home / "model"))
    assert whole.quantization is None
    assert "trained on a base with 4-bit nf4, doubly quantised weights, and here they are " in (
        capsys.readouterr().err
    )


def test_the_code_of_an_export_loads_the_base_in_4_bits(small) -> None:
    opened = open_run(small)
    scope = {"base": opened.recipe.model.model_name_or_path}
    exec(base_code(opened), scope)
    load_controls(scope["model"], small / "controls")
    assert torch.equal(logits(scope["model"]), logits(opened.adapted.model))


def test_whole_weights_are_exported_from_the_unquantised_base(small) -> None:
    recipe = open_run(small).recipe
    trained, notes = open_for("standalone", recipe, lambda recipe: open_run(small, recipe=recipe))
    assert trained.quantization is None
    assert notes[0].startswith("Written from the unquantised base, in float32; trained on it in 4")
    assert "of the largest) of those of the run" in notes[0]
    assert "- trained on: its weights in 4-bit nf4, doubly quantised" in card.base_lines(trained)
    trained, notes = open_for("controls", recipe, lambda recipe: open_run(small, recipe=recipe))
    assert (trained.quantization, notes) == (NF4, ())


def test_a_base_that_is_there_in_4_bits_alone_is_no_standalone_folder(
    small, packed, tmp_path
) -> None:
    base = BaseOptions(path=packed)
    with refused(MocError):
        export_run(ExportOptions(small, "standalone", tmp_path / "out", base_options=base))


def test_compare_says_how_the_bases_were_kept(call, small, home, capsys) -> None:
    folder = home / "whole"
    assert run([*call, "--json", "--output-dir", str(folder)]) == 0
    capsys.readouterr()
    assert run(["compare", str(small), str(folder), "--json"]) == 0
    said = capsys.readouterr().out
    assert "weights of the base: 4-bit nf4, doubly quantised in small; unquantised in whole" in said
    assert "Different base models" not in said


def test_two_quantisations_exclude_each_other(call, capsys) -> None:
    eight = ["--set", "model.load_in_8bit=true"]
    assert run([*call, *FOUR, *eight]) == 2
    assert "load_in_4bit and load_in_8bit exclude each other" in capsys.readouterr().err
    assert run([*call, "--set", "model.bnb_4bit_quant_type=fp4"]) == 2
    assert "only load_in_4bit: true reads this key" in capsys.readouterr().err
    assert run([*call, *FOUR, "--set", "method={name: lora, init: pissa}"]) == 2
    assert "method.init: pissa rewrites the base's weights" in capsys.readouterr().err
    assert run([*call, *eight, "--set", "method=dora"]) == 2
    assert "dora does not run over 8-bit weights" in capsys.readouterr().err


@pytest.mark.real
def test_smollm2_learns_in_4_bits(tmp_path, real_weights, real_data, monkeypatch) -> None:
    """Its first three layers: that they learn something new is enough here."""
    built, make = [], build.build
    monkeypatch.setattr(build, "build", lambda *given: built.append(make(*given)) or built[-1])
    torch.set_num_threads(share_of_the_cores())
    data, weights = real_data / "commonsense", tmp_path / "smollm2-3-layers"
    whole = load_model(str(real_weights("smollm2-135m")), kind="causal").model
    whole.model.layers, whole.config.num_hidden_layers = whole.model.layers[:3], 3
    whole.save_pretrained(weights)
    load_tokenizer(str(real_weights("smollm2-135m"))).save_pretrained(weights)
    keys = {
        "model.model_name_or_path": str(weights),
        "model.load_in_4bit": True,
        "data.path": str(data),
        "data.tasks": ["ARC-Easy"],
        "data.max_train_samples": 1,
        "train.max_steps": 2,
        "train.per_device_train_batch_size": 1,
        "train.warmup_steps": 0,
        "train.lr_scheduler_type": "constant",
        "train.learning_rate": 1e-4,
        "eval.before": False,
        "eval.max_samples": 1,
        "output.save_strategy": "no",
        "output.logging_steps": 1,
        "output.output_dir": str(tmp_path / "run"),
    }
    sets = [w for key, value in keys.items() for w in ("--set", f"{key}={json.dumps(value)}")]
    assert run(["train", "commonsense/smollm2-135m/moc", "--json", *sets]) == 0
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    opened = open_run(tmp_path / "run")
    expected = logits(opened.adapted.model)
    assert torch.equal(logits(built[0].adapted.model), expected)
    whole = load_model(str(weights), kind="causal")
    assert whole.weights_hash == opened.weights_hash
    with warned(UserWarning):
        load_controls(whole.model, tmp_path / "run" / "controls")
    assert not torch.equal(logits(whole.model), expected)
