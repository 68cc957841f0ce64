"""What leaves a run: the names of its classes, its inputs in the card, no private path."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.tiny_runs import train_on_rows
from transformers import AutoConfig, AutoModelForSequenceClassification, pipeline

from moc_cli import load_controls
from moc_cli.cli import run
from moc_cli.export.card import evaluation_lines, make_card
from moc_cli.export.parity import Reference, Written
from moc_cli.load_run import LoadedRun, open_run
from moc_cli.recipe.tasks import TASKS

NAMES = {0: "bad", 1: "good"}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with an encoder, rows of two classes and a run on them."""
    home = tmp_path_factory.mktemp("private-place")
    rows = [{"text": f"{'so ' * (n % 3)}{n}", "label": NAMES[n % 2]} for n in range(24)]
    train_on_rows(home, "bert", rows)
    return home


@pytest.fixture
def trained(home) -> LoadedRun:
    return open_run(home / "run")


def card_of(trained: LoadedRun) -> str:
    empty = trained.adapted.model.dummy_inputs["input_ids"].float()
    proof = {"bit_equal": True, "positions": 1, "rows": 1}
    return make_card(trained, Written("", Reference({}, empty, empty)), proof, "peft", {})


@pytest.mark.usefixtures("same_process")
def test_classes_have_their_names_wherever_a_run_goes(home, tmp_path):
    before = os.umask(0o027)
    try:
        for form in ("standalone", "controls", "peft"):
            command = [
                "export",
                str(home / "run"),
                "--to",
                form,
                "--output-dir",
                str(tmp_path / form),
            ]
            assert run([*command, "--json"]) == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    config = AutoConfig.from_pretrained(tmp_path / "standalone", trust_remote_code=True)
    assert (config.id2label, config.label2id) == (NAMES, {"bad": 0, "good": 1})
    classify = pipeline(
        "text-classification", model=str(tmp_path / "standalone"), trust_remote_code=True
    )
    assert classify("so 3")[0]["label"] in NAMES.values()
    for form in ("controls", "peft"):
        adapter = json.loads((tmp_path / form / "adapter_config.json").read_text())
        assert adapter["id2label"] == {"0": "bad", "1": "good"}
    for form in ("standalone", "controls", "peft"):
        card = (tmp_path / form / "README.md").read_text()
        assert "| 1 | good |" in card
        assert str(home) not in card
        assert "private-place" not in card
        assert "attention_mask" in card
    assert 'base = "model"  # the folder of the base model' in card


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("method", ["moc", "control"])
def test_a_classifier_trained_in_bfloat16_goes_to_peft_to_the_bit(method, home, tmp_path, capsys):
    name = {"moc": [], "control": ["--set", "method={name: control, rank: 4}"]}[method]
    options = ["--set", "train.bf16=true", *name, "--output-dir", str(tmp_path / "run")]
    assert run(["train", str(home / "recipe.yaml"), *options, "--json"]) == 0
    capsys.readouterr()
    command = ["export", str(tmp_path / "run"), "--to", "peft", "--json"]
    assert run([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["parity"]["bit_equal"] is True


def test_a_loaded_adapter_names_the_classes_of_its_model(home):
    model = AutoModelForSequenceClassification.from_pretrained(home / "model", num_labels=2)
    controls = load_controls(model, home / "run" / "controls")
    assert model.config.id2label == NAMES
    controls.detach()
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert model.config.label2id == {"LABEL_0": 0, "LABEL_1": 1}
    named = {0: "no", 1: "yes"}
    model = AutoModelForSequenceClassification.from_pretrained(home / "model", id2label=named)
    load_controls(model, home / "run" / "controls")
    assert model.config.id2label == named


def test_samples_name_the_classes(home, tmp_path):
    assert run(["eval", str(home / "run"), "--output-dir", str(tmp_path), "--json"]) == 0
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert sample["label_name"] == NAMES[sample["label"]]
        assert sample["prediction_name"] == NAMES[sample["prediction"]]


def test_the_card_names_a_base_of_the_hub_and_the_tokenizer(trained):
    card = card_of(trained)
    assert "base_model" not in card
    assert "Tokenizer: that of the base model; `" in card
    for name in ("gpt2", "org/name"):
        model = trained.recipe.model.model_copy(update={"model_name_or_path": name})
        vars(trained)["recipe"] = trained.recipe.model_copy(update={"model": model})
        assert f'base_model: "{name}"' in card_of(trained)


def test_every_class_of_a_benchmark_has_a_name():
    for task in TASKS["glue"].values():
        if task.kind == "classification":
            assert len(set(task.labels)) == task.num_labels > 1


def test_the_card_says_nothing_of_answers_that_a_classifier_does_not_learn(trained):
    card = card_of(trained)
    assert "loss on" not in card
    assert "train_on_inputs" not in card


def test_the_card_names_the_rows_of_each_evaluation(trained, tmp_path):
    """Other rows than the run's, and those that lm_eval takes, are told from its own."""
    shared = {"controls_sha256": trained.adapter_config["payload_sha256"], "tasks": {}}
    written = [
        {"protocol": "classify", "limit": None, "path": str(tmp_path / "new.csv")},
        {"protocol": "classify", "limit": 7},
        {"protocol": "harness", "limit": 5},
    ]
    folder = SimpleNamespace(
        read_evaluations=lambda: {str(n): shared | one for n, one in enumerate(written)}
    )
    text = "\n".join(evaluation_lines(replace(trained, folder=folder)))
    assert "protocol `classify`, all rows of `new.csv`." in text
    assert "protocol `classify`, 7 drawn rows a task." in text
    assert "protocol `harness`, the first 5 rows a task." in text
