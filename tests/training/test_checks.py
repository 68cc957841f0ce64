"""What `moc train` finds out before weights load: positions, unknown tokens, an own head."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from support.messages import warned
from support.models import make_byte_tokenizer, make_pair_tokenizer, make_tiny_model
from transformers import AutoModelForSequenceClassification

from moc_cli import attach, load_controls
from moc_cli.cli import run

SMALL = ["--set", "method.rank=2", "--set", "method.gate.projection_dim=4", "--set"]
SMALL += ["data.held_out=4", "--set", "train.max_steps=2", "--set", "eval.before=false"]
SMALL += ["--set", "eval.eval_strategy=no", "--set", "train.warmup_ratio=0"]


def classes(folder: Path, *options: str) -> list[str]:
    """Arguments of a training on a CSV with the classes bad and good, and the model in `folder`."""
    lines = [
        f"item {n} {'works' if n % 2 else 'broke'},{'good' if n % 2 else 'bad'}\n"
        for n in range(20)
    ]
    (folder / "rows.csv").write_text("text,label\n" + "".join(lines))
    sets = ["--set", f"model.model_name_or_path={folder / 'model'}"]
    sets += ["--set", f"data.path={folder / 'rows.csv'}", "--set", "data.max_length=64"]
    return [
        "train",
        "custom/minilm/moc",
        *SMALL,
        *sets,
        *options,
        "--output-dir",
        str(folder / "run"),
    ]


@pytest.fixture
def encoder(tmp_path):
    """A folder with a classifier of its own classes: 0 = POSITIVE, 1 = NEGATIVE."""
    model = make_tiny_model("bert", num_labels=2, max_position_embeddings=64)
    model.config.id2label = {0: "POSITIVE", 1: "NEGATIVE"}
    model.save_pretrained(tmp_path / "model")
    make_pair_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def test_more_tokens_than_positions_are_refused_before_weights_load(encoder, capsys):
    (encoder / "model" / "model.safetensors").unlink()
    for more in ([], ["--dry-run"]):
        assert run([*classes(encoder, "--set", "data.max_length=128"), *more]) == 2
        assert "data.max_length 128, the model takes 64" in capsys.readouterr().err
    assert not (encoder / "run").exists()


def test_a_token_without_an_embedding_is_named(tmp_path, capsys):
    make_tiny_model("bert", num_labels=2).save_pretrained(tmp_path / "model")
    tokenizer = make_pair_tokenizer()
    tokenizer.add_tokens(["broke"])
    tokenizer.save_pretrained(tmp_path / "model")
    assert run([*classes(tmp_path), "--dry-run"]) == 2
    assert "the rows hold the token 'broke' (264)" in capsys.readouterr().err


def test_a_checkpoints_own_head_is_told_and_a_recipe_can_train_it(encoder, capsys):
    assert run([*classes(encoder), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["modules"] == 0
    (note,) = plan["notes"]
    assert "kept and frozen" in note
    assert "0 = POSITIVE, 1 = NEGATIVE; the rows' classes: 0 = bad, 1 = good" in note
    trained = classes(encoder, "--set", "train.modules=classifier")
    assert run([*trained, "--json"]) == 0
    captured = capsys.readouterr()
    assert "which is trained further" in captured.err
    assert json.loads(captured.out)["parameters"]["modules"] == 66
    model = AutoModelForSequenceClassification.from_pretrained(encoder / "model")
    before = model.classifier.weight.detach().clone()
    load_controls(model, encoder / "run" / "controls")
    assert not torch.equal(model.classifier.weight, before)
    assert run(["eval", str(encoder / "run"), "--json"]) == 0
    assert run([*classes(encoder, "--set", "train.modules=clasifier"), "--dry-run"]) == 2


def test_attach_warns_of_a_head_that_stays_as_it_was_drawn(encoder):
    folder = encoder / "model"
    with warned(UserWarning):
        attach(make_tiny_model("bert", num_labels=2), "control", rank=2)
    fresh = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, ignore_mismatched_sizes=True
    )
    with warned(UserWarning):
        attach(fresh, "control", rank=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(AutoModelForSequenceClassification.from_pretrained(folder), "control", rank=2)
        attach(make_tiny_model("llama"), "control", rank=2)
        fresh = make_tiny_model("bert", num_labels=2)
        attach(fresh, "control", rank=2, modules=["classifier"])


def test_a_decoder_without_a_pad_token_is_trained_as_a_classifier(tmp_path, capsys):
    make_tiny_model("llama", pad_token_id=None).save_pretrained(tmp_path / "model")
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert run([*classes(tmp_path), "--json"]) == 0
    assert "batches are filled with '</s>' (2)" in capsys.readouterr().err
    scores = []
    for size in ("1", "4"):
        output = tmp_path / size
        arguments = [
            "eval",
            str(tmp_path / "run"),
            "--batch-size",
            size,
            "--output-dir",
            str(output),
        ]
        assert run(arguments) == 0
        lines = (output / "samples.jsonl").read_text().splitlines()
        scores.append([json.loads(line)["scores"] for line in lines])
    torch.testing.assert_close(torch.tensor(scores[0]), torch.tensor(scores[1]))
