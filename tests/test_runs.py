"""The run folder: who may write to it, and what it gives back."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save
from support.messages import refused

from moc_cli.adapter.folder import read_adapter
from moc_cli.errors import FileError, MocError, RunError
from moc_cli.runs import Call, RunFolder

RECIPE = "seed: 1\n"
CALL = Call("moc train r.yaml")
PAYLOAD = save({"controls.0.attn.A": torch.ones(2, 3)})


def make_run(path) -> None:
    """A run folder as a finished training leaves it."""
    with RunFolder.claim(path, call=CALL, resume=False, overwrite=False) as run:
        run.begin(RECIPE, fresh=True)
        run.save_controls({"method": {"name": "moc"}}, PAYLOAD)
        run.write_results({"status": "running", "before": {}})
        run.metrics.write_text('{"step": 1}\n')
        (run.checkpoints / "step-000001").mkdir(parents=True)


def test_a_new_folder_is_made_only_when_the_run_begins(tmp_path):
    path = tmp_path / "deep" / "run"
    with RunFolder.claim(path, call=CALL, resume=False, overwrite=False) as run:
        assert not path.exists()
        run.begin(RECIPE, fresh=True)
        assert run.recipe_file.read_text() == RECIPE


def test_an_occupied_folder_is_refused_with_the_commands(tmp_path):
    path = tmp_path / "my run"
    make_run(path)
    with refused(RunError):
        RunFolder.claim(
            path, call=Call("moc train 'my recipe.yaml'", "my run"), resume=False, overwrite=False
        )
    assert (path / "metrics.jsonl").exists()


def test_a_hint_names_nothing_that_would_be_refused(tmp_path):
    path = tmp_path / "run"
    make_run(path)
    (path / "thesis.tex").write_text("years")
    with refused(RunError):
        RunFolder.claim(path, call=CALL, resume=False, overwrite=False)
    (path / "recipe.yaml").unlink()
    with refused(RunError):
        RunFolder.claim(path, call=CALL, resume=False, overwrite=False)


def test_an_empty_folder_is_taken(tmp_path):
    with RunFolder.claim(tmp_path, call=CALL, resume=False, overwrite=False) as run:
        run.begin(RECIPE, fresh=True)


def test_overwrite_drops_the_old_run_only_when_the_new_one_begins(tmp_path):
    path = tmp_path / "run"
    make_run(path)
    (path / ".tmp-results.json-4194305").write_text("")  # of a process that is gone
    with RunFolder.claim(path, call=CALL, resume=False, overwrite=True) as run:
        assert (path / "controls").is_dir()
        run.begin("seed: 2\n", fresh=True)
    assert sorted(os.listdir(path)) == [".lock", "recipe.yaml"]
    assert run.recipe_file.read_text() == "seed: 2\n"


def test_overwrite_spares_what_no_run_made(tmp_path):
    path = tmp_path / "run"
    make_run(path)
    (path / "thesis.tex").write_text("years")
    with refused(RunError):
        RunFolder.claim(path, call=CALL, resume=False, overwrite=True)
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    for resume in (False, True):
        with refused(RunError):
            RunFolder.claim(other, call=CALL, resume=resume, overwrite=not resume)
    assert (path / "controls").is_dir()
    assert (other / "checkpoints").is_dir()


def test_a_refused_training_makes_and_empties_nothing(tmp_path):
    """The lock of a stranger's folder is a link to a file of ours."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in (".lock", "thesis.tex"):
        folder = tmp_path / f"with {name}"
        folder.mkdir()
        (folder / name).symlink_to(victim)
        with refused(MocError):
            RunFolder.claim(folder, call=CALL, resume=False, overwrite=True)
        assert os.listdir(folder) == [name]
    assert victim.read_text() == "mine"


def test_a_folder_of_leftovers_counts_as_empty(tmp_path):
    """A kill while recipe.yaml was written left them; no option is needed, and all work."""
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        (tmp_path / ".tmp-recipe.yaml-4194305").write_text("half")
        (tmp_path / ".lock").touch()
        with RunFolder.claim(tmp_path, call=CALL, resume=resume, overwrite=overwrite) as run:
            run.begin(RECIPE, fresh=True)
        assert sorted(os.listdir(tmp_path)) == [".lock", "recipe.yaml"]
        (tmp_path / "recipe.yaml").unlink()


def test_a_place_where_no_folder_can_be_made_is_told(tmp_path):
    run = RunFolder.claim("/proc/moc", call=CALL, resume=False, overwrite=False)
    with refused(FileError, reason="(?<=/proc/moc: ).*"):
        run.begin(RECIPE, fresh=True)


def test_resume_keeps_everything(tmp_path):
    make_run(tmp_path)
    with RunFolder.claim(tmp_path, call=CALL, resume=True, overwrite=False) as run:
        run.begin(RECIPE, fresh=False)
        assert run.read_metrics() == [{"step": 1}]
        assert run.read_results() == {"format": 2, "status": "running", "before": {}}


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "run").write_text("")
    with refused(RunError):
        RunFolder.claim(tmp_path / "run", call=CALL, resume=True, overwrite=True)


def test_two_processes_do_not_share_a_folder(tmp_path):
    code = (
        "import sys\n"
        "from moc_cli.errors import RunError; from moc_cli.runs import Call, RunFolder\n"
        "try: RunFolder.claim(sys.argv[1], call=Call('r'), resume=True, overwrite=False)\n"
        "except RunError as error: sys.exit(error.message)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with RunFolder.claim(tmp_path, call=CALL, resume=False, overwrite=False) as run:
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 1
        assert f"in use by another process (process {os.getpid()})" in second.stderr
        run.begin(RECIPE, fresh=True)
    third = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (third.returncode, third.stderr) == (0, "")


def test_the_slower_of_two_that_make_a_folder_is_refused(tmp_path):
    path = tmp_path / "run"
    slow = RunFolder.claim(path, call=CALL, resume=False, overwrite=False)
    make_run(path)
    with refused(RunError):
        slow.begin(RECIPE, fresh=True)
    assert (path / "controls").is_dir()


def test_a_flipped_bit_in_the_controls_is_seen(tmp_path):
    make_run(tmp_path)
    run = RunFolder.open(tmp_path)
    adapter = read_adapter(run.controls)
    config, payload = adapter.config, adapter.payload()
    assert (config["method"], payload) == ({"name": "moc"}, PAYLOAD)
    (run.controls / "adapter_model.safetensors").write_bytes(PAYLOAD[:-1] + b"x")
    with refused(RunError):
        read_adapter(run.controls).payload()
    (run.controls / "adapter_model.safetensors").unlink()
    with refused(RunError):
        read_adapter(run.controls).payload()


def test_reading_says_what_is_missing(tmp_path):
    with refused(RunError):
        RunFolder.open(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = RunFolder.open(tmp_path)
    with refused(RunError):
        run.read_results()
    (tmp_path / "results.json").write_text("[1")
    with refused(RunError, reason="(?<=not JSON: ).*"):
        run.read_results()
    assert run.read_metrics() == []


def test_damaged_results_and_metrics_are_told(tmp_path):
    make_run(tmp_path)
    run = RunFolder.open(tmp_path)
    run.write_results({"status": "finished", "tasks": [], "steps": 1})
    with refused(RunError):
        run.read_results()
    run.write_results({"status": "finished", "tasks": {}, "steps": "many"})
    with refused(RunError):
        run.read_results()

    def with_line(line: bytes) -> None:
        run.metrics.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')

    for line, reason in {b"{bad": ".*", b"\xff": ".*", b"[" * 100_000: ".*recursion.*"}.items():
        with_line(line)
        with refused(RunError, reason=f"(?<=not JSON: ){reason}"):
            run.read_metrics()
    low = b'{"step": 1, "eval": {"loss": "low"}}'
    for line in (b"[1]", b"3", b"{}", b'{"step": true}', low):
        with_line(line)
        with refused(RunError):
            run.read_metrics()


def test_numbers_of_rows_that_are_shown_must_be_there(tmp_path):
    make_run(tmp_path)
    run = RunFolder.open(tmp_path)
    template, part = {"sha256": "1"}, {"sha256": "2", "rows": 3}
    run.write_environment({"data": {"template": template, "test a": part}})
    assert run.read_environment()["data"]["test a"]["rows"] == 3
    run.write_environment({"data": {"template": template, "test a": template}})
    with refused(RunError):
        run.read_environment()
    score = {"value": 1.0, "stderr": None, "majority": None, "n": 2}
    entry = {"metric": "m", "metrics": {"m": score}, "limited": True}
    (tmp_path / "eval" / "rank").mkdir(parents=True)
    results = {"format": 2, "protocol": "rank", "tasks": {"a": entry}}
    file = tmp_path / "eval" / "rank" / "results.json"
    file.write_text(json.dumps(results))
    with refused(RunError):
        run.read_evaluations()
    entry["rows"] = 4
    file.write_text(json.dumps(results))
    assert run.read_evaluations()["rank"]["tasks"]["a"]["rows"] == 4


def test_a_cut_last_line_of_metrics_is_left_out(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    lines = [json.dumps({"step": step}) for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 3')
    assert RunFolder.open(tmp_path).read_metrics() == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_used(number, tmp_path, monkeypatch, capsys):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    make_run(tmp_path / "run")
    assert "its file system has no locks" in capsys.readouterr().err
    assert (tmp_path / "run" / "controls").is_dir()
