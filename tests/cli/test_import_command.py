"""`moc import`: controls of attach, the Trainer and peft are a run for all other commands."""

import json

import pytest
import torch
from peft import get_peft_model
from support.models import train_controls
from transformers import AutoModelForCausalLM

from moc_cli.api import attach
from moc_cli.cli import run
from moc_cli.load_run import open_run
from moc_cli.peft import MocConfig
from moc_cli.runs import RunFolder

KEYS = {"rank": 3, "top_k": 2, "gate": {"projection_dim": 8}}


@pytest.fixture
def base(choices, tmp_path):
    return AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()


def save(surface, base, folder):
    """Controls as if trained, saved by one of the surfaces; the state under our keys."""
    if surface == "peft":
        model = get_peft_model(base, MocConfig(seed=7, **KEYS))
        mixture = base.moc.moc_mixtures["default"]
        train_controls(dict(mixture.named_parameters()))
        model.save_pretrained(folder)
        return mixture.state_dict()
    controls = attach(base, "moc", seed=7, **KEYS)
    train_controls(controls.named_parameters())
    if surface == "attach":
        controls.save(folder)
    else:
        base.save_pretrained(folder)  # as the Trainer calls it
    return controls.adapted.state()


@pytest.mark.parametrize("surface", ["attach", "trainer", "peft"])
def test_controls_of_every_surface_become_a_run(surface, base, tmp_path, choices, capsys):
    expected = save(surface, base, tmp_path / "mine")
    home = tmp_path / "taken"
    options = ["--set", "eval.max_samples=2", "--output-dir", str(home)]
    assert run(["import", str(tmp_path / "mine"), choices[1], *options]) == 0
    assert f"moc eval {home}" in capsys.readouterr().err
    loaded = open_run(home)
    assert (loaded.recipe.method.rank, loaded.recipe.seed) == (3, 7)
    state = loaded.adapted.state()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.usefixtures("same_process", "no_pictures")
def test_every_command_takes_the_run(base, tmp_path, choices, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("attach", base, tmp_path / "mine")
    homes = [str(tmp_path / name) for name in ("one", "two")]
    for home in homes:
        options = ["--set", "eval.max_samples=2", "--output-dir", home]
        assert run(["import", str(tmp_path / "mine"), choices[1], *options]) == 0
        assert run(["eval", home]) == 0
    for command in (
        ["inspect-routing", homes[0]],
        ["generate", homes[0], "--prompt", "Hello", "--max-new-tokens", "2"],
        ["export", homes[0], "--to", "controls", "--output-dir", str(tmp_path / "out")],
        ["compare", *homes],
    ):
        assert run(command) == 0, command
    assert "its controls were trained elsewhere" in " ".join(capsys.readouterr().err.split())


def test_another_base_is_refused_and_nothing_is_written(base, tmp_path, choices, capsys):
    save("attach", base, tmp_path / "mine")
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    other.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    other.save_pretrained(tmp_path / "model")
    home = tmp_path / "taken"
    options = ["--output-dir", str(home), "--json"]
    assert run(["import", str(tmp_path / "mine"), choices[1], *options]) == 2
    assert "other weights than the base" in json.loads(capsys.readouterr().out)["error"]
    assert not RunFolder(home).path.exists()
