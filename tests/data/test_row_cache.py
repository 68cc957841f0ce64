"""Tokenised rows from the disk are those that tokenising gives; whatever decides them counts."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from support.models import make_byte_tokenizer
from transformers import PreTrainedTokenizerFast

from moc_cli.cli import run
from moc_cli.data import row_cache
from moc_cli.data.commonsense import make_example
from moc_cli.data.encode import Encoded, encode_pairs, encode_texts
from moc_cli.data.examples import PairExample, TextExample

Example = Any


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache, which takes any number of rows."""
    monkeypatch.setattr(row_cache, "SMALLEST", 1)
    monkeypatch.setenv("MOC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerFast,
    how: Callable[..., Encoded] = encode_texts,
    **arguments: Any,
) -> tuple[Encoded, str]:
    """Encode through the cache, and say where the rows are from: `made`, `kept` or `` (neither)."""
    arguments = {"max_length": 40} | arguments
    encoded, note = row_cache.encode_cached(
        partial(how, examples, tokenizer, **arguments), examples, tokenizer, arguments
    )
    words = {"rows were tokenised before": "kept", "tokenised rows are kept": "made"}
    return encoded, next((word for text, word in words.items() if text in (note or "")), note or "")


QUESTIONS = [make_example("boolq", f"Is it {n}?", ["true", "false"], n % 2) for n in range(5)]
SHORT = [TextExample("t", letter) for letter in "abc"]


@pytest.mark.parametrize(
    ("examples", "how"),
    [
        (QUESTIONS, encode_texts),
        (SHORT, encode_texts),
        ([PairExample("t", "one", "two", n) for n in (0, 1)], encode_pairs),
        ([PairExample("t", "one two", None, n) for n in (0.5, 2)], encode_pairs),
    ],
)
def test_kept_rows_are_the_rows(
    examples: list[Example],
    how: Callable[..., Encoded],
    folder: Path,
    byte_tokenizer: PreTrainedTokenizerFast,
) -> None:
    made, where = encode(examples, byte_tokenizer, how)
    assert where == "made"
    assert made == how(examples, byte_tokenizer, max_length=40)
    kept, where = encode(examples, byte_tokenizer, how)
    assert where == "kept"
    assert kept == made
    assert len(list(folder.iterdir())) == 1


def test_whatever_decides_the_tokens_names_another_file(
    folder: Path, byte_tokenizer: PreTrainedTokenizerFast, pair_tokenizer: PreTrainedTokenizerFast
) -> None:
    assert encode(QUESTIONS, byte_tokenizer)[1] == "made"
    assert encode(QUESTIONS, byte_tokenizer, max_length=39)[1] == "made"
    assert encode(QUESTIONS, byte_tokenizer, train_on_inputs=False)[1] == "made"
    assert encode(QUESTIONS[1:], byte_tokenizer)[1] == "made"
    assert encode(QUESTIONS, pair_tokenizer)[1] == "made"
    assert len(list(folder.iterdir())) == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chat_template", "{{ bos_token }}{{ messages[0]['content'] }}"),
        ("bos_token", "</s>"),
        ("eos_token", "<s>"),
        ("model_input_names", ["input_ids", "token_type_ids", "attention_mask"]),
    ],
)
def test_what_is_beside_the_tokenizers_file_names_another_file(
    name: str, value: Any, folder: Path
) -> None:
    tokenizer = make_byte_tokenizer()
    encode(SHORT, tokenizer)
    setattr(tokenizer, name, value)
    assert encode(SHORT, tokenizer)[1] == "made"


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_other_versions_name_another_file(
    package: str,
    folder: Path,
    byte_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode(SHORT, byte_tokenizer)
    monkeypatch.setattr(
        row_cache, "version", lambda name: "0" if name == package else version(name)
    )
    assert encode(SHORT, byte_tokenizer)[1] == "made"


def test_a_damaged_file_is_written_again(
    folder: Path, byte_tokenizer: PreTrainedTokenizerFast
) -> None:
    made, _ = encode(QUESTIONS, byte_tokenizer)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), b"x" * 99):
        path.write_bytes(content)
        assert encode(QUESTIONS, byte_tokenizer) == (made, "made")
        assert path.read_bytes() == whole


def test_what_is_not_kept(
    folder: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOC_CACHE", "off")
    assert encode(QUESTIONS, byte_tokenizer)[1] == ""
    monkeypatch.setenv("MOC_CACHE", str(folder.parent))
    monkeypatch.setattr(row_cache, "SMALLEST", 6)
    assert encode(QUESTIONS, byte_tokenizer)[1] == ""
    monkeypatch.setattr(row_cache, "SMALLEST", 1)
    monkeypatch.setattr(byte_tokenizer, "chat_template", "{{ strftime_now('%d') }}")
    assert encode(QUESTIONS, byte_tokenizer)[1] == ""
    assert not folder.exists()
    folder.parent.write_text("a file where the folder would be")
    monkeypatch.undo()
    monkeypatch.setattr(row_cache, "SMALLEST", 1)
    monkeypatch.setenv("MOC_CACHE", str(folder.parent))
    assert "tokenised rows are not kept" in encode(QUESTIONS, byte_tokenizer)[1]


def test_only_the_files_used_last_stay(
    folder: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_cache, "KEPT", 2)
    for length in (10, 11):
        encode(SHORT, byte_tokenizer, max_length=length)
        for place, file in enumerate(folder.iterdir()):
            os.utime(file, (place, place))
    assert encode(SHORT, byte_tokenizer, max_length=10)[1] == "kept"  # used just now
    encode(SHORT, byte_tokenizer, max_length=12)
    assert len(list(folder.iterdir())) == 2
    assert encode(SHORT, byte_tokenizer, max_length=10)[1] == "kept"


def test_a_training_takes_kept_rows_and_says_so(
    folder: Path, choices: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    notes = []
    for change in (
        (),
        (),
        ("--set", "data.max_length=500"),
        ("--set", "data.train_on_inputs=false"),
    ):
        assert run([*choices, "--dry-run", "--json", *change]) == 0
        plan = json.loads(capsys.readouterr().out)
        notes.append(next(note for note in plan["notes"] if str(folder) in note))
    assert "are kept in" in notes[0]
    assert "tokenised before" in notes[1]
    assert all("are kept in" in note for note in notes[2:])  # other keys, other rows
