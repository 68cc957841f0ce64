"""Commands on a checkpoint, and on a run that was interrupted before its end."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load, load_file
from support.tiny_runs import choices_run

from moc_cli.adapter.folder import read_adapter
from moc_cli.cli import run
from moc_cli.runs import RunFolder
from moc_cli.training.loop import Loop
from moc_cli.training.session import Session


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run with checkpoints of steps 3 and 6, beside its model and data."""
    home = tmp_path_factory.mktemp("checkpoints")
    changes = ["--set", "eval.before=false", "--set", "output.save_steps=3"]
    assert run([*choices_run(home), *changes]) == 0
    return home / "run"


def ask(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[dict, str]:
    capsys.readouterr()
    code = run([*map(str, arguments), "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.out + shown.err
    return json.loads(shown.out), shown.err


@pytest.mark.usefixtures("same_process", "no_pictures")
def test_a_checkpoint_is_exported_scored_and_inspected(trained, tmp_path, capsys):
    first = trained / "checkpoints" / "step-000003"
    to = ["--to", "controls", "--output-dir", tmp_path / "out"]
    _, said = ask(capsys, "export", first, *to)
    assert "the controls are those of a checkpoint, step 3" in said
    exported = read_adapter(tmp_path / "out")
    assert exported.config["step"] == 3
    saved = load_file(first / "trainables.safetensors")
    kept = load(exported.payload())
    assert kept.keys() == saved.keys()
    assert all(kept[name].equal(saved[name]) for name in saved)
    assert "controls of a checkpoint, step 3" in (tmp_path / "out" / "README.md").read_text()
    scored, _ = ask(capsys, "eval", first, "--limit", 2)
    assert Path(scored["folder"]).parent == trained / "eval"
    assert scored["folder"].endswith("-step-000003")
    ask(capsys, "inspect-routing", first, "--limit", 2)
    assert (trained / "routing" / "step-000003" / "routing.json").is_file()


def test_an_interrupted_run_stands_for_its_newest_checkpoint(trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    ended, _ = ask(capsys, "eval", trained, "--limit", 4, "--output-dir", tmp_path / "a")
    shutil.rmtree(folder / "controls")
    (folder / "results.json").write_text('{"status": "running", "before": {}}')
    last, said = ask(capsys, "eval", folder, "--limit", 4, "--output-dir", tmp_path / "b")
    assert "those of a checkpoint, step 6" in said
    scores = [found["tasks"]["ARC-Easy"]["metrics"] for found in (ended, last)]
    assert scores[0] == scores[1]
    answer, _ = ask(capsys, "generate", folder, "--prompt", "Why?", "--max-new-tokens", 2)
    assert answer["model"] == str(folder / "checkpoints" / "step-000006")


def test_a_finished_run_that_goes_on_stands_for_its_newest_checkpoint_until_it_ends(
    trained, tmp_path, capsys, monkeypatch
):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    assert RunFolder.open(folder).checkpoint is None
    recipe = str(trained.parent / "recipe.yaml")
    options = ["eval.before=false", "output.save_steps=3", "train.max_steps=9"]
    sets = [word for option in options for word in ("--set", option)]
    going_on = ["train", recipe, *sets, "--output-dir", str(folder), "--resume", "auto"]

    def stop(self):
        self.interrupt.signal = 15

    def stop_scoring(self, job):
        self.interrupt.signal = 15
        self.interrupt.check()

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "write_line", stop)  # it is due after step 8
        assert run(going_on) == 143
    assert read_adapter(folder / "controls").config["step"] == 6
    assert RunFolder.open(folder).checkpoint == folder / "checkpoints" / "step-000008"
    scored, said = ask(capsys, "eval", folder, "--limit", 2)
    assert "those of a checkpoint, step 8" in said
    assert scored["folder"].endswith("-step-000008")
    with monkeypatch.context() as patch:
        patch.setattr(Session, "score_trained", stop_scoring)  # all steps are taken
        assert run(going_on) == 143
    assert RunFolder.open(folder).checkpoint is None
    assert read_adapter(folder / "controls").config["step"] == 9
    assert run(going_on) == 0
    assert RunFolder.open(folder).checkpoint is None


def test_the_newest_checkpoint_has_the_largest_number(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    for name in ("step-999999", "step-1000000", "step-000010", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    newest = RunFolder.open(tmp_path).checkpoint
    assert newest is not None
    assert newest.name == "step-1000000"


def test_a_damaged_checkpoint_is_told(trained, tmp_path, capsys):
    folder = Path(shutil.copytree(trained, tmp_path / "run")) / "checkpoints" / "step-000003"
    file = folder / "trainables.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"abcd")
    assert run(["eval", str(folder)]) == 2
    assert "step-000003 is damaged: trainables.safetensors" in capsys.readouterr().err
    assert run(["eval", str(folder.with_name("step-000004"))]) == 2
    said = capsys.readouterr().err
    assert "has no checkpoint step-000004; it has step-000003, step-000006" in said
