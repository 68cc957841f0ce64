"""Commands on a run folder that came from a stranger, or that something has damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save
from support.messages import refused
from support.tiny_runs import choices_run

from moc_cli import load_controls
from moc_cli.adapter.folder import CONFIG, PAYLOAD, stamp
from moc_cli.cli import run
from moc_cli.errors import RunError
from moc_cli.models.load import load_model

Say = Callable[..., str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run, beside its model and data."""
    home = tmp_path_factory.mktemp("strange")
    assert run([*choices_run(home), "--set", "eval.before=false"]) == 0
    return home / "run"


@pytest.fixture
def strange(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(trained, tmp_path / "strange"))


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Say:
    """`refusal(*arguments)` runs a command, which must be refused, and returns what it says."""

    def call(*arguments: str | Path) -> str:
        capsys.readouterr()
        assert run([str(argument) for argument in arguments]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return call


def commands(folder: Path, output: Path) -> list[list[str]]:
    """Every command that loads a run."""
    name = str(folder)
    return [
        ["eval", name, "--limit", "2"],
        ["export", name, "--to", "controls", "--output-dir", str(output / "export")],
        ["inspect-routing", name, "--limit", "2"],
        ["generate", name, "--prompt", "Why?", "--max-new-tokens", "2"],
    ]


def change_recipe(folder: Path, old: str, new: str) -> None:
    path = folder / "recipe.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change adapter_config.json; its hashes are right, as a stranger can compute them too."""
    payload = (folder / "controls" / PAYLOAD).read_bytes()
    config = json.loads((folder / "controls" / CONFIG).read_text())
    change(config)
    (folder / "controls" / CONFIG).write_text(json.dumps(stamp(config, payload)))


def test_a_recipe_alone_lets_no_code_run(
    strange: Path, tmp_path: Path, trained: Path, refusal: Say
) -> None:
    """The model's folder holds code that would tell that it ran."""
    model = Path(shutil.copytree(trained.parent / "model", tmp_path / "model"))
    (model / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedConfig\n"
        "class Evil(PreTrainedConfig):\n    model_type = 'evil'\n"
    )
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (model / "config.json").write_text(json.dumps(config))
    change_recipe(strange, str(trained.parent / "model"), str(model))
    change_recipe(strange, "trust_remote_code: false", "trust_remote_code: true")
    recipe = str(strange / "recipe.yaml")
    calls = [*commands(strange, tmp_path), ["train", recipe, "--dry-run"], ["train", recipe]]
    for call in calls:
        said = refusal(*call)
        assert "model.trust_remote_code: true" in said
        assert "add --trust-remote-code" in said
    assert not (tmp_path / "ran").exists()
    refusal("eval", strange, "--trust-remote-code")
    assert (tmp_path / "ran").exists()


def test_sizes_are_held_against_the_payload_before_anything_is_made(
    strange: Path, tmp_path: Path, refusal: Say
) -> None:
    change_recipe(strange, "rank: 4", "rank: 100000000")
    change_config(strange, lambda config: config["method"].update(rank=100_000_000))
    for call in commands(strange, tmp_path):
        assert "says method.rank = 100000000, but its payload holds only " in refusal(*call)


def test_numbers_that_are_not_finite_are_refused_by_every_command(
    strange: Path, tmp_path: Path, refusal: Say
) -> None:
    path = strange / "controls" / PAYLOAD
    state = load(path.read_bytes())
    state["controls.0.attn.B"][0, 0] = float("nan")
    path.write_bytes(save(state))
    change_config(strange, lambda config: None)
    for call in commands(strange, tmp_path):
        assert "controls.0.attn.B holds numbers that are not finite" in refusal(*call)


def test_a_layer_with_an_odd_name_is_told(strange: Path, refusal: Say) -> None:
    path = strange / "controls" / PAYLOAD
    state = load(path.read_bytes())
    state["controls.\u00b2.attn.B"] = state.pop("controls.0.attn.B")
    path.write_bytes(save(state))
    change_config(strange, lambda config: None)
    assert "is not a tensor of method moc" in refusal("inspect-routing", strange)


def test_no_output_goes_through_a_link_out_of_the_run(
    strange: Path, tmp_path: Path, refusal: Say
) -> None:
    (tmp_path / "mine").mkdir()
    for name in ("eval", "routing"):
        shutil.rmtree(strange / name, ignore_errors=True)
        (strange / name).symlink_to(tmp_path / "mine")
    assert "a link leads out of" in refusal("eval", strange, "--limit", "2")
    assert "a link leads out of" in refusal("inspect-routing", strange, "--limit", "2")
    assert not list((tmp_path / "mine").iterdir())


def test_load_controls_names_the_tensors_of_another_base(trained: Path) -> None:
    model = load_model(str(trained.parent / "model"), kind="causal").model
    model.resize_token_embeddings(model.config.vocab_size + 8)
    with refused(RunError):
        load_controls(model, trained / "controls")


@pytest.mark.parametrize("name", ["comparison.json", "loss.svg"])
def test_compare_replaces_only_its_own_files(
    name: str, trained: Path, strange: Path, tmp_path: Path, refusal: Say
) -> None:
    command = ["compare", str(trained), str(strange), "--output-dir", str(tmp_path / "out")]
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    assert f"{out / name} is damaged or was not written by `moc compare`" in refusal(*command)
    assert [path.name for path in out.iterdir()] == [name]
    (out / name).unlink()
    assert [run(command), run(command)] == [0, 0]


@pytest.mark.parametrize("name", ["routing.json", "routing-map.png"])
def test_inspect_routing_replaces_only_its_own_files(
    name: str, trained: Path, tmp_path: Path, refusal: Say
) -> None:
    command = ["inspect-routing", str(trained), "--limit", "2", "--output-dir", str(tmp_path)]
    (tmp_path / name).write_text('{"run": 1}')
    assert f"{tmp_path / name} is damaged or was not written by `moc inspect-routing`" in refusal(
        *command
    )
    assert (tmp_path / name).read_text() == '{"run": 1}'
