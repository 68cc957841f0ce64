"""Hashes of large bases are kept by the path, size and time of their files."""

import os
from pathlib import Path

import pytest
from support.models import make_tiny_model

from moc_cli.models import known_tensors, load
from moc_cli.models.load import Loaded, load_model
from moc_cli.recipe.quantization import Quantization


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """A base that counts as large, and a cache of its own."""
    monkeypatch.setattr(known_tensors, "SMALLEST", 0)
    monkeypatch.setenv("MOC_CACHE", str(tmp_path / "cache"))
    make_tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """A line for each time that tensors are hashed."""
    calls, describe = [], load.describe_tensors
    monkeypatch.setattr(
        load, "describe_tensors", lambda *given: calls.append("hashed") or describe(*given)
    )
    return calls


def open_base(folder: Path, **options) -> Loaded:
    return load_model(str(folder), kind="causal", **options)


def test_a_base_is_hashed_once(base, hashed) -> None:
    first, again = open_base(base), open_base(base)
    assert (first.tensors, first.weights_hash) == (again.tensors, again.weights_hash)
    small = open_base(base, quantization=Quantization(load_in_4bit=True))
    assert small.weights_hash == first.weights_hash
    assert len(hashed) == 1
    open_base(base, dtype="bfloat16")
    assert len(hashed) == 2


def test_changed_files_are_hashed_again(base, hashed) -> None:
    before = open_base(base)
    make_tiny_model("llama", seed=1).save_pretrained(base)
    assert open_base(base).weights_hash != before.weights_hash
    os.utime(base / "model.safetensors", ns=(1, 1))
    open_base(base)
    assert len(hashed) == 3


def test_a_damaged_entry_is_as_if_it_were_not_there(base, hashed, tmp_path) -> None:
    before = open_base(base)
    (entry,) = (tmp_path / "cache" / "weights").iterdir()
    for content in ("", "{", '{"tensors": {"a": 1}}', "[]"):
        entry.write_text(content)
        assert open_base(base).weights_hash == before.weights_hash
    assert len(hashed) == 5


def test_without_a_folder_that_can_be_written_it_is_hashed_each_time(
    base, hashed, tmp_path, monkeypatch
) -> None:
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("MOC_CACHE", str(tmp_path / "a file"))
    assert open_base(base).weights_hash == open_base(base).weights_hash
    monkeypatch.setenv("MOC_CACHE", "off")
    open_base(base)
    assert len(hashed) == 3
