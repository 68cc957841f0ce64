"""Classifiers over decoders: they pool by the pad token of the run, wherever the run goes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support.messages import refused
from support.models import (
    DECODERS,
    make_byte_tokenizer,
    make_tiny_model,
    tiny_config,
    train_controls,
)
from support.tiny_runs import train_on_rows
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModel,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import moc_cli.peft  # noqa: F401 - makes the method known to peft
from moc_cli import load_controls
from moc_cli.cli import run
from moc_cli.export import standalone
from moc_cli.load_run import open_run
from moc_cli.methods import attach
from moc_cli.recipe.methods import MocMethod
from moc_cli.recipe.tasks import CLASSIFIER

ROWS = [{"text": f"{'so ' * (n % 3)}{n}", "label": ("bad", "good")[n % 2]} for n in range(24)]
LORA = {"name": "lora", "rank": 2}
OTHER = 7  # the tokenizer pads with token 0


def classifier_run(home: Path, monkeypatch: pytest.MonkeyPatch, pad: int | None, **more) -> Path:
    """Train on a Llama whose config has the pad token `pad`."""
    from support import tiny_runs

    save = tiny_runs.save_model

    def save_model(folder: Path, family: str) -> None:
        save(folder, family)
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"pad_token_id": pad}))

    monkeypatch.setattr(tiny_runs, "save_model", save_model)
    return train_on_rows(home, "llama", ROWS, **more)


def base_of(home: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(home / "model", num_labels=2).eval()


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.tensor([[9, 11, 12, 13], [9, OTHER, 0, 0], [9, 0, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("pad", [OTHER, None])
def test_loaded_controls_bring_the_pad_token_and_take_it_away(pad, tmp_path, monkeypatch):
    folder = classifier_run(tmp_path, monkeypatch, pad)
    assert (
        json.loads((folder / "controls" / "adapter_config.json").read_text())["pad_token_id"] == 0
    )
    trained = logits(open_run(folder).adapted.model)
    model = base_of(tmp_path)
    controls = load_controls(model, folder / "controls")
    assert torch.equal(logits(model), trained)
    controls.save(tmp_path / "again")
    other = base_of(tmp_path)
    load_controls(other, tmp_path / "again")
    assert torch.equal(logits(other), trained)
    assert controls.detach().config.pad_token_id == pad


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("pad", [OTHER, None])
@pytest.mark.parametrize("form", ["controls", "peft", "static", "standalone", "lora"])
def test_exports_are_read_back_with_it(form, pad, tmp_path, monkeypatch):
    folder = classifier_run(
        tmp_path, monkeypatch, pad, **({"method": LORA} if form == "lora" else {})
    )
    out = tmp_path / "out"
    to = "peft" if form == "lora" else form
    assert run(["export", str(folder), "--to", to, "--output-dir", str(out), "--json"]) == 0
    if form == "standalone":
        assert json.loads((out / "config.json").read_text())["pad_token_id"] == 0
    else:
        assert "pad_token_id = 0" in (out / "README.md").read_text()
    if form == "peft":
        trained, model = open_run(folder).adapted.model, base_of(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(model, out)), logits(trained))


CLASSIFIERS = [
    f for f in DECODERS if type(tiny_config(f)) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
]


def write_standalone(
    family: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[PreTrainedModel, Path]:
    """Return a classifier with controls, and the folder that holds it."""
    model = make_tiny_model(family, num_labels=2, perturbed=True)
    method = MocMethod.model_validate({"rank": 4, "alpha": 0.6, "gate": {"projection_dim": 8}})
    adapted = attach(model, method, new_modules=("score",), seed=1)
    train_controls(adapted.named_trainables())
    folder = place / "out"
    standalone.write(model, make_byte_tokenizer(), adapted.adapter_config(), CLASSIFIER, folder)
    modules = str(place / "modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
    monkeypatch.setattr(sys, "path", [*sys.path, modules])
    return model.eval(), folder


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_standalone_classifiers_of_every_decoder_answer_as_the_run(family, tmp_path, monkeypatch):
    model, folder = write_standalone(family, tmp_path, monkeypatch)
    for _ in range(2):  # as it was written, and saved again
        found = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(logits(found.eval()), logits(model))
        folder = tmp_path / "again"
        found.save_pretrained(folder)


def test_the_inner_model_of_a_standalone_classifier_is_not_loaded_alone(tmp_path, monkeypatch):
    with refused(ValueError):
        AutoModel.from_pretrained(
            write_standalone("llama", tmp_path, monkeypatch)[1], trust_remote_code=True
        )
