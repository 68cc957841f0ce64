"""Seeded fuzzers: a mutated recipe, run folder or adapter is refused with a sentence, or read.

`MOC_FUZZ=300` makes so many mutations of each; without it a few, for the suite.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from support.machine import ROOT
from support.tiny_runs import choices_run

from moc_cli import load_controls
from moc_cli.adapter.folder import CONFIG, PAYLOAD, stamp
from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.models.load import load_model
from moc_cli.recipe.load import load_recipe

LONG = int(os.environ.get("MOC_FUZZ", "0"))
ODD = (
    *(None, True, False, 0, -1, 1, 2**63, 10**400, 1e308, -1e-308, "", "nan", "\u00b2", "a\u2028b"),
    *("\x1b[2J", "../..", "~", "/proc/self", "x" * 5000, [], {}, [[]], {"a": {}}, [None], 0.5),
)
FILES = (
    *("results.json", "environment.json", "eval/rank-limit-2/results.json"),
    *("eval/rank-limit-2/samples.jsonl", "metrics.jsonl", f"controls/{CONFIG}"),
    "checkpoints/step-000006/state.json",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run, scored on two rows."""
    home = tmp_path_factory.mktemp("fuzz")
    assert run([*choices_run(home), "--set", "eval.before=false"]) == 0
    assert run(["eval", str(home / "run"), "--limit", "2"]) == 0
    return home / "run"


def change(value: Any, rng: random.Random) -> Any:
    """Change one place inside plain values: another value, a key lost, one more, a nesting."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        if rng.random() < 0.1:
            for _ in range(rng.choice([3, 150, 900])):
                value = [value]
            return value
        return rng.choice(ODD)
    if isinstance(value, list):
        place = rng.randrange(len(value))
        return [*value[:place], change(value[place], rng), *value[place + 1 :]]
    key = rng.choice(list(value))
    kind = rng.random()
    if kind < 0.2:
        return {name: item for name, item in value.items() if name != key}
    if kind < 0.25:
        return value | {rng.choice(["", "\u00b2", "x" * 300, "__class__"]): rng.choice(ODD)}
    return value | {key: change(value[key], rng)}


def damage(text: str, rng: random.Random) -> bytes:
    """Change a JSON text: its values, or its bytes."""
    if rng.random() < 0.75:
        return json.dumps(change(json.loads(text), rng)).encode()
    content = bytearray(text.encode())
    place = rng.randrange(len(content))
    if rng.random() < 0.5:
        return bytes(content[:place])
    content[place] ^= rng.randrange(1, 256)
    return bytes(content)


def mutate(folder: Path, rng: random.Random) -> str:
    """Damage a file of the run; hashes are right where a stranger could compute them."""
    name = rng.choice(FILES)
    path = folder / name
    if name.endswith(".jsonl"):
        lines = path.read_text().split("\n")[:-1]
        place = rng.randrange(len(lines))
        content = [line.encode() for line in lines]
        content[place] = damage(lines[place], rng)
        path.write_bytes(b"\n".join(content) + b"\n")
    elif name.endswith(CONFIG) and rng.random() < 0.7:
        config = change(json.loads(path.read_text()), rng)
        if isinstance(config, dict):
            with contextlib.suppress(RecursionError):  # too deep for a hash: it keeps the old one
                config = stamp(config, path.with_name(PAYLOAD).read_bytes())
        path.write_text(json.dumps(config))
    else:
        path.write_bytes(damage(path.read_text(), rng))
    if "samples" in name:
        results = json.loads(path.with_name("results.json").read_text())
        results["samples_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        path.with_name("results.json").write_text(json.dumps(results))
    return name


@pytest.mark.usefixtures("same_process")
def test_a_damaged_run_folder_gives_no_traceback(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(trained.parent / "recipe.yaml")
    codes = []
    for seed in range(LONG or 12):
        rng = random.Random(f"run {seed}")
        folder = tmp_path / str(seed)
        shutil.copytree(trained, folder)
        name = mutate(folder, rng)
        commands: list[list[str | Path]] = [
            ["compare", folder, trained, "--output-dir", tmp_path / "compared"],
            ["eval", folder, "--limit", "2"],
            ["export", folder, "--to", "controls", "--output-dir", tmp_path / f"export-{seed}"],
            ["inspect-routing", folder, "--limit", "2", "--output-dir", tmp_path / "routing"],
            ["train", recipe, "--output-dir", folder, "--resume", "auto"],
        ]
        command = [str(word) for word in (rng.choice(commands[:3]) if seed % 5 else commands[-1])]
        if name == "metrics.jsonl" and seed % 2:
            command = [str(word) for word in commands[3]]
        capsys.readouterr()
        try:
            codes.append(run(command))
        except Exception as error:
            pytest.fail(f"mutation {seed} of {name}, {command[0]}: {error!r}")
        assert codes[-1] in (0, 2), (seed, name, command)
        said = capsys.readouterr().err
        assert codes[-1] == 0 or "Error: " in said
        shutil.rmtree(folder)
    print(f"{len(codes)} mutated run folders: {codes.count(2)} refused")


def test_a_damaged_adapter_gives_no_traceback(trained: Path, tmp_path: Path) -> None:
    model = load_model(str(trained.parent / "model"), kind="causal").model
    names = set(model.state_dict())
    refused = 0
    for seed in range(LONG or 40):
        rng = random.Random(f"adapter {seed}")
        folder = Path(shutil.copytree(trained / "controls", tmp_path / str(seed)))
        config, payload = json.loads((folder / CONFIG).read_text()), folder / PAYLOAD
        if rng.random() < 0.5:
            content = payload.read_bytes()
            header = 8 + int.from_bytes(content[:8], "little")
            edge = rng.choice([header, len(content)])
            place = rng.randrange(edge)
            cut = content[:place] if rng.random() < 0.3 else content
            payload.write_bytes(cut[:place] + bytes([rng.randrange(256)]) + cut[place + 1 :])
        else:
            config = change(config, rng)
        if isinstance(config, dict) and rng.random() < 0.9:
            with contextlib.suppress(RecursionError):  # too deep for a hash: it keeps the old one
                config = stamp(config, payload.read_bytes())
        (folder / CONFIG).write_text(json.dumps(config))
        try:
            load_controls(model, folder).detach()
        except MocError:
            refused += 1
        except Exception as error:
            pytest.fail(f"mutation {seed}: {error!r}")
        assert set(model.state_dict()) == names
        shutil.rmtree(folder)
    print(f"{LONG or 40} mutated adapters: {refused} refused")


def test_a_mutated_recipe_gives_no_traceback(tmp_path: Path) -> None:
    good = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    refused = 0
    for seed in range(LONG or 60):
        rng = random.Random(f"recipe {seed}")
        values = good
        for _ in range(rng.randrange(1, 4)):
            values = change(values, rng)
        path = tmp_path / "mutated.yaml"
        path.write_text(json.dumps(values))  # JSON is YAML
        try:
            load_recipe(path)
        except MocError:
            refused += 1
    print(f"{LONG or 60} mutated recipes: {refused} refused")


@pytest.mark.usefixtures("same_process")
def test_no_command_calls_the_network_with_local_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket that refuses, and no offline switch in the environment."""
    called = []

    def refuse(*arguments: object, **options: object) -> NoReturn:
        called.append(arguments)
        raise OSError("no network in this test")

    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    methods: dict[Any, tuple[str, ...]] = {
        socket.socket: ("connect", "connect_ex", "sendto"),
        socket: ("getaddrinfo", "create_connection"),
    }
    for owner, names in methods.items():
        for name in names:
            monkeypatch.setattr(owner, name, refuse)
    folder = str(tmp_path / "run")
    commands: list[list[str]] = [
        [*choices_run(tmp_path), "--set", "eval.before=false", "--set", "train.max_steps=2"],
        ["eval", folder, "--limit", "2"],
        ["inspect-routing", folder, "--limit", "2"],
        ["export", folder, "--to", "controls", "--output-dir", str(tmp_path / "export")],
    ]
    for command in commands:
        assert run(command) == 0
    assert called == []
