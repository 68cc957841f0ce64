"""A model whose files are damaged, or do not belong together, is refused in one sentence."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.messages import refused
from support.models import make_byte_tokenizer, make_tiny_model

from moc_cli.errors import MocError
from moc_cli.models.fingerprint import fingerprint, same_base
from moc_cli.models.load import build_meta, load_model, load_tokenizer

CAUSAL = {"kind": "causal"}
CLASSES = {"kind": "classification", "num_labels": 2}


def saved(folder: Path, family: str = "llama", **changes: object) -> str:
    """A model's folder, its config changed after the weights were written."""
    make_tiny_model(family).save_pretrained(folder)
    make_byte_tokenizer().save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"hidden_size": "many"}, "expected int, got str"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
    ],
)
def test_a_damaged_config_is_told_by_all_that_read_it(changes, reason, tmp_path):
    name = saved(tmp_path, **changes)
    for load in (
        lambda: build_meta(name, **CAUSAL),
        lambda: load_model(name, **CAUSAL),
        lambda: load_tokenizer(name),
    ):
        with refused(MocError, reason=f"(?<=loaded: ).*{reason}.*"):
            load()


def test_a_config_nested_without_end_is_told(tmp_path):
    name = saved(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    with refused(MocError, reason="RecursionError: .*"):
        load_tokenizer(name)


@pytest.mark.parametrize(
    ("family", "wanted", "changes"),
    [
        ("llama", CAUSAL, {"hidden_size": 64}),
        ("llama", CAUSAL, {"num_hidden_layers": 3}),
        ("llama", CAUSAL, {"num_hidden_layers": 1}),
        ("bert", CLASSES, {"vocab_size": 999}),
        ("bert", CLASSES, {"num_hidden_layers": 3}),
        ("bert", CLASSES, {"num_hidden_layers": 1}),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(family, wanted, changes, tmp_path):
    with refused(MocError):
        load_model(saved(tmp_path, family, **changes), **wanted)


def test_a_classifier_may_lack_its_head_and_its_pooler(tmp_path):
    assert load_model(saved(tmp_path, "bert"), **CLASSES).new_modules == (
        "bert.pooler",
        "classifier",
    )


@pytest.mark.parametrize("length", [0, 20, -100])
def test_weights_cut_off_are_told_before_they_load(length, tmp_path):
    name, path = saved(tmp_path), tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    for load in (build_meta, load_model):
        with refused(MocError, reason=r"(?<=damaged \().*(?=\))"):
            load(name, **CAUSAL)


def test_a_pointer_of_git_lfs_is_told_before_weights_load(tmp_path):
    name, path = saved(tmp_path), tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    for load in (build_meta, load_model):
        with refused(MocError):
            load(name, **CAUSAL)


def test_only_the_files_that_are_loaded_are_read(tmp_path):
    name = saved(tmp_path)
    (tmp_path / "stray.safetensors").write_bytes(b"cut off")
    whole = load_model(name, **CAUSAL)
    whole.model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    build_meta(name, **CAUSAL)
    assert load_model(name, **CAUSAL).weights_hash == whole.weights_hash
    part = next(tmp_path.glob("model-*.safetensors"))
    part.unlink()
    with refused(MocError, part=re.escape(part.name)):
        load_model(name, **CAUSAL)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with refused(MocError):
        load_model(name, **CAUSAL)


def test_pickled_weights_are_refused(tmp_path):
    name = saved(tmp_path)
    weights = next(Path(name).glob("*.safetensors"))
    torch.save(load_file(weights), Path(name) / "pytorch_model.bin")
    weights.unlink()
    with refused(MocError, reason="(?<=loaded: ).*safetensors.*"):
        load_model(name, **CAUSAL)


@pytest.mark.parametrize("place", [0, -1])
def test_a_fingerprint_is_of_values_from_first_to_last(place):
    model = make_tiny_model("llama")
    before = fingerprint(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[place, place] += 1
    assert same_base(before, fingerprint(model)) is False


def test_a_cap_on_the_attention_is_not_left_out(tmp_path, monkeypatch):
    model = make_tiny_model("gemma2")
    model.save_pretrained(tmp_path)
    # As in transformers 5.17, whose sdpa ignores the cap.
    monkeypatch.setattr(type(model), "_supports_sdpa", True)
    loaded = load_model(str(tmp_path), kind="causal").model
    shapes = build_meta(str(tmp_path), kind="causal")
    assert loaded.config._attn_implementation == shapes.config._attn_implementation == "eager"
    for read in (load_model, build_meta):
        with refused(MocError):
            read(str(tmp_path), kind="causal", attn_implementation="sdpa")
