"""Streams that cannot be written to, signals, and what the system refuses: no command is lost."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from support.machine import ROOT

from moc_cli import cli
from moc_cli.report.characters import printable
from moc_cli.report.output import print_json, print_table
from moc_cli.report.progress import WorkProgress
from moc_cli.report.streams import lasting_streams
from moc_cli.report.tables import FittedTable
from moc_cli.signals import stopped_by_signals

MOC = [sys.executable, "-m", "moc_cli"]
HOSTILE = "a\x1b]0;xb\x9b1m\u202e"
SHOWN = "a\\x1b]0;xb\\x9b1m\\u202e"


class Broken(io.StringIO):
    """A stream that refuses to be written to."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, text: str) -> int:
        raise OSError(self.number, os.strerror(self.number))


def in_place_of_moc(monkeypatch: pytest.MonkeyPatch, action: Callable[[], None]) -> None:
    def app(**options: object) -> None:
        action()

    monkeypatch.setattr(cli, "make_app", lambda names: app)


def test_a_log_that_cannot_be_written_ends_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def work() -> None:
        with WorkProgress("score", 2) as bar:
            bar.observe(1)
            bar.observe(2)
        done.append(True)

    in_place_of_moc(monkeypatch, work)
    closed = io.StringIO()
    closed.close()
    for stream in (Broken(errno.ENOSPC), Broken(errno.EPIPE), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.run([]) == 0
    assert len(done) == 4


def test_results_that_cannot_be_printed_are_told_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_place_of_moc(monkeypatch, lambda: print_json({"a": 1}))
    for stream, code in ((Broken(errno.EPIPE), 0), (None, 0), (Broken(errno.ENOSPC), 2)):
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.run([]) == code
    told = "Error: cannot write to standard output: No space left on device\n"
    assert capsys.readouterr().err == told


def test_closed_and_full_streams_of_a_process() -> None:
    command = f"{sys.executable} -m moc_cli recipes show quickstart"
    for redirect, code, said in (
        (">/dev/full", 2, "Error: cannot write to standard output: No space left on device\n"),
        (">&- 2>&-", 0, ""),
        ("| true", 0, ""),
    ):
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command} {redirect}"],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )
        assert (done.returncode, done.stderr) == (code, said)


def test_control_characters_are_shown_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("a\xa0\u3000b") == "a\xa0\u3000b"
    table = FittedTable(HOSTILE, ["a"], [[HOSTILE]])
    with lasting_streams():
        print_table(table, HOSTILE)
        print_json({"name": HOSTILE})
        with WorkProgress(HOSTILE, 1) as bar:
            bar.observe(1)
    told = capsys.readouterr()
    assert told.out.count(SHOWN) == 3
    assert '"a\\u001b]0;xb\\u009b1m\\u202e"' in told.out
    assert f"{SHOWN} 1/1" in told.err
    assert all(char == "\n" or char.isprintable() for char in told.out + told.err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cleans_up_and_a_second_one_does_not_cut_it_off(
    number: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            (tmp_path / "clean").touch()

    in_place_of_moc(monkeypatch, work)
    assert cli.run([]) == 128 + number
    assert (tmp_path / "clean").exists()
    assert capsys.readouterr().err == f"stopped by signal {int(number)}\n"
    assert signal.getsignal(number) is signal.SIG_DFL


def test_typer_passes_the_signal_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(10)

    app = typer.Typer()
    app.command()(work)
    monkeypatch.setattr(cli, "make_app", lambda names: app)
    assert cli.run([]) == 129


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_the_system_refuses_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(error: OSError) -> None:
        raise error

    cases = {
        "f: Permission denied": PermissionError(errno.EACCES, "Permission denied", "f"),
        "f: File name too long": OSError(errno.ENAMETOOLONG, "File name too long", "f"),
        "the working directory is gone": FileNotFoundError(errno.ENOENT, "No such file"),
    }
    for told, error in cases.items():
        in_place_of_moc(monkeypatch, lambda error=error: refuse(error))
        assert cli.run([]) == 2
        assert capsys.readouterr().err.startswith(f"Error: {told}\n")
    in_place_of_moc(monkeypatch, lambda: refuse(OSError("a library's own")))
    with pytest.raises(OSError, match="a library's own"):
        cli.run([])


def test_paths_that_the_system_cannot_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = "n" * 300
    recipe = tmp_path / "r.yaml"
    recipe.write_text((ROOT / "recipes" / "quickstart.yaml").read_text())
    for command in (
        ["train", long],
        ["train", str(recipe), "--output-dir", long],
        ["train", str(recipe), "--set", 'output.output_dir="a\\0b"'],
        ["train", str(recipe), "--set", "output.output_dir=~nobody-of-this-name/x"],
        ["train", str(recipe), "--set", f"data.path={long}", "--set", "data.suite=custom"],
        ["eval", long],
        ["compare", long, "b"],
        ["recipes", "copy", "quickstart", long],
    ):
        assert cli.run(command) == 2
        assert capsys.readouterr().err.startswith(("Error: ", "n", f"{recipe}", "--set"))
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.run(["train", str(recipe), "--output-dir", "x"]) == 2
    assert capsys.readouterr().err.startswith("Error: the working directory is gone")


def test_home_is_expanded_in_a_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    from moc_cli.recipe.load import load_recipe

    monkeypatch.setenv("HOME", "/home/me")
    recipe = load_recipe("quickstart", ["output.output_dir=~/runs/x"])
    assert recipe.output.output_dir == "/home/me/runs/x"
