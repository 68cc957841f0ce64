"""Nothing is lost: signals, full disks, damaged files and uploads that fail, on one tiny run."""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError
from support.messages import refused
from support.tiny_runs import choices_run

from moc_cli.cli import run
from moc_cli.errors import FileError
from moc_cli.export import parity
from moc_cli.recipe.schema import Recipe
from moc_cli.runs import RunFolder
from moc_cli.training import checkpoint
from moc_cli.training.loop import Loop

SIGNALS = [signal.SIGTERM, signal.SIGHUP]


class ConnectError(Exception):
    """As that of the hub's client, which is no OSError."""


QUICK = ["--set", "eval.before=false", "--set", "train.max_steps=3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, scored on all rows."""
    home = tmp_path_factory.mktemp("reliable")
    assert run([*choices_run(home), *QUICK]) == 0
    assert run(["eval", str(home / "run")]) == 0
    return home / "run"


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "copy"))


def train(trained: Path, folder: Path, *options: str) -> int:
    recipe = str(trained.parent / "recipe.yaml")
    return run(["train", recipe, *QUICK, "--output-dir", str(folder), *options])


def stopping(number: int) -> Any:
    """A function that sends this process a signal, and waits for it."""

    def stop(*arguments: object, **options: object) -> NoReturn:
        os.kill(os.getpid(), number)
        time.sleep(10)
        raise AssertionError("no signal came")

    return stop


def half_written(folder: Path) -> list[Path]:
    return list(folder.rglob(".tmp-*"))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_a_checkpoint_of_the_step(
    number: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = Loop.count

    def counted(self: Loop, *arguments: Any) -> None:
        count(self, *arguments)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(Loop, "count", counted)
    assert train(trained, tmp_path / "run") == 128 + number
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-000001"]
    monkeypatch.setattr(Loop, "count", count)
    assert train(trained, tmp_path / "run", "--resume", "auto") == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_nothing_half_written(
    number: int, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "prove", stopping(number))
    export = ["export", str(copy), "--to", "controls", "--output-dir", str(tmp_path / "out")]
    assert run(export) == 128 + number
    assert os.listdir(tmp_path) == ["copy"]
    monkeypatch.setattr(os, "replace", stopping(number))
    assert run(["eval", str(copy), "--limit", "1"]) == 128 + number
    assert half_written(tmp_path) == []


@pytest.mark.parametrize("error", [ConnectError("connection refused"), OSError("no route to host")])
def test_an_upload_that_fails_leaves_a_complete_export(
    error: Exception,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*arguments: object, **options: object) -> NoReturn:
        raise error

    def prove(folder: Path, written: parity.Written, *others: object) -> dict[str, Any]:
        figures = parity.compare(written.expected, written.expected.logits)
        return parity.check_tolerance(figures, written.dtype)

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    monkeypatch.setattr(parity, "prove", prove)
    out = tmp_path / "out"
    export = ["export", str(trained), "--to", "controls", "--output-dir", str(out)]
    assert run([*export, "--push-to-hub", "me/x"]) == 2
    told = f"Error: {out} is complete, but the upload to 'me/x' failed: {error}\n"
    assert told in capsys.readouterr().err
    assert {"README.md", "adapter_config.json"} <= set(os.listdir(out))


@pytest.mark.parametrize("name", ["results.json", "environment.json"])
@pytest.mark.parametrize("content", ["[]", '{"status": 3, "history": 1}', "[" * 5000])
def test_a_damaged_small_file_is_written_again(
    name: str, content: str, trained: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / name).write_text(content)
    assert train(trained, copy, "--resume", "auto") == 0
    said = capsys.readouterr().err
    assert f"{copy / name} cannot be read" in said
    assert "; it is written again" in said
    assert RunFolder(copy).read_results()["status"] == "finished"
    assert len(RunFolder(copy).read_history()) == (1 if name == "environment.json" else 2)


def test_outputs_with_odd_line_ends_are_paired(copy: Path, tmp_path: Path) -> None:
    (results,) = copy.glob("eval/*/results.json")
    samples = results.with_name("samples.jsonl")
    lines = [json.loads(line) | {"output": "a\u2028b\u0085c"} for line in samples.open()]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    samples.write_text(text)
    values = json.loads(results.read_text())
    values["samples_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    results.write_text(json.dumps(values))
    other, out = shutil.copytree(copy, tmp_path / "other"), tmp_path / "out"
    assert run(["compare", str(copy), str(other), "--output-dir", str(out)]) == 0
    (difference,) = json.loads((out / "comparison.json").read_text())["differences"]
    assert difference["low"] is not None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EIO])
def test_a_disk_that_refuses_is_told_with_what_helps(
    number: int,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*arguments: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint, "save", refuse)
    assert train(trained, tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert os.strerror(number) in said
    assert ("free some disk space" in said) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert "--resume auto" in said


def test_a_full_log_ends_no_training(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stderr", Full())
    assert train(trained, tmp_path / "run") == 0
    assert RunFolder(tmp_path / "run").read_results()["status"] == "finished"


def test_a_full_folder_for_temporary_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> NoReturn:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(parity, "save_file", refuse)
    with refused(FileError, folder=re.escape(tempfile.gettempdir())):
        parity.fresh_logits(Path("x"), "", {"input_ids": torch.zeros(1)})


def numbers(schema: Any, place: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every number of a JSON schema, with where it stands."""
    if isinstance(schema, dict):
        if schema.get("type") in ("integer", "number"):
            yield place, schema
        for key, value in schema.items():
            yield from numbers(value, f"{place}/{key}")
    elif isinstance(schema, list):
        for number, value in enumerate(schema):
            yield from numbers(value, f"{place}/{number}")


def test_every_number_of_a_recipe_has_bounds() -> None:
    found = dict(numbers(Recipe.model_json_schema()))
    assert len(found) > 40
    for place, schema in found.items():
        bounds = {"maximum", "exclusiveMaximum"} & schema.keys()
        assert bounds or place.endswith("labels/anyOf/0/items/anyOf/1"), place
