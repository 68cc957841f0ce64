"""The command line: help, sentences instead of tracebacks, exit codes, JSON, quick answers."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from support.machine import ROOT
from typer.models import OptionInfo

from moc_cli import __version__, cli
from moc_cli.cli import COMMANDS
from moc_cli.errors import MocError

MOC = [sys.executable, "-m", "moc_cli"]
TYPO = "method: {rnak: 4}\nmodel: {model_name_or_path: '[red]m'}\ntrian: 1\n"


@pytest.fixture
def typo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder holding `typo.yaml`, with markup in a value."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "typo.yaml").write_text(TYPO)
    return tmp_path


def test_help_names_the_commands(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["--help"]) == 0
    shown = re.findall(r"^│ ([a-z][a-z-]*) {2,}", capsys.readouterr().out, flags=re.M)
    assert shown == list(cli.COMMANDS)
    assert cli.run(["train", "--help"]) == 0
    assert "--set" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "eval", "compare", "inspect-routing", "export"])
def test_a_folder_to_write_has_one_name(command: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.run([command, "--help"]) == 0
    assert re.findall(r"--output\S*", capsys.readouterr().out) == ["--output-dir"]
    asked = {"compare": ["a", "b"], "export": ["a", "--to", "peft"]}.get(command, ["a.yaml"])
    assert cli.run([command, *asked, "--output", "out"]) == 2
    assert "No such option" not in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_with_its_own_name_as_metavar_is_declared(command: str) -> None:
    """Else typer 0.26 and 0.27 take the metavar, in capitals, for the option's name."""
    module, attribute = COMMANDS[command]
    function = getattr(import_module(f"moc_cli.cli.{module}"), attribute)
    commands = getattr(function, "registered_commands", None)
    functions = [info.callback for info in commands] if commands else [function]
    for parameters in (inspect.signature(each, eval_str=True).parameters for each in functions):
        for name, parameter in parameters.items():
            for option in getattr(parameter.annotation, "__metadata__", ()):
                if isinstance(option, OptionInfo) and not isinstance(option.default, str):
                    assert option.metavar != name.upper()  # its `default` is the declared name


def test_no_command_is_answered_with_the_help(capsys: pytest.CaptureFixture) -> None:
    assert cli.run([]) == 2
    captured = capsys.readouterr()
    assert "Commands" in captured.out
    assert captured.err == ""


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"moc {__version__}\n"


@pytest.mark.usefixtures("typo")
def test_a_broken_recipe_is_sentences_on_stderr(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["train", "typo.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    told = captured.err.splitlines()
    assert [line.split(": ")[:2] for line in told] == [
        ["typo.yaml", "data"],
        ["typo.yaml", "output"],
        ["typo.yaml:1", "method.name"],
        ["typo.yaml:3", "trian"],
        ["Error", "4 mistakes in the recipe"],
    ]


@pytest.mark.usefixtures("typo")
def test_a_broken_recipe_is_json_on_request(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["train", "typo.yaml", "--json"]) == 2
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert captured.err == ""
    assert answer["hint"] is None
    assert answer["error"].count("\n") == 3
    assert answer["problems"][-1]["place"] == "typo.yaml:3"
    assert answer["problems"][-1]["key"] == "trian"
    assert answer["problems"][-1]["message"].startswith("unknown key; did you mean 'train'?")


@pytest.mark.usefixtures("typo")
def test_a_single_mistake_and_its_hint(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["train", "tpyo.yaml"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("Error: tpyo.yaml: no such file")
    assert "did you mean 'typo.yaml'?" in told[0]
    assert told[1].startswith("Hint: moc recipes list")


def test_a_users_text_is_no_markup(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    name = "[bold red]x[/] \x1b]0;owned\x07" + "y" * 60
    assert cli.run(["recipes", "show", name]) == 2
    text = capsys.readouterr().err
    assert "[bold red]x[/]" in text
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "y" * 60 in text  # not wrapped


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["trian"], "No such command 'trian'", "moc --help"),
        (["train", "--foo"], "No such option: --foo", "moc train --help"),
        (["train"], "Missing argument 'RECIPE'", "moc train --help"),
        (["recipes", "shwo"], "No such command 'shwo'", "moc recipes --help"),
    ],
)
def test_wrong_usage_is_a_sentence(
    arguments: list[str], error: str, hint: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.run(arguments) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith(f"Error: {error}")
    assert told[1] == f"Hint: {hint}"
    assert cli.run([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["hint"] == hint


def test_exit_codes_and_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A user's mistake is 2, Ctrl-C 130; a bug keeps its traceback."""

    def failing(error: BaseException) -> object:
        def app(**_: object) -> None:
            raise error

        return lambda names: app

    monkeypatch.setattr(cli, "make_app", failing(MocError("[b]wrong", "do right")))
    assert cli.run([]) == 2
    assert capsys.readouterr().err == "Error: [b]wrong\nHint: do right\n"
    monkeypatch.setattr(cli, "make_app", failing(KeyboardInterrupt()))
    assert cli.run([]) == 130
    monkeypatch.setattr(cli, "make_app", failing(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        cli.run([])


def test_list_show_and_schema(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["recipes", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    quick = next(entry for entry in listed if entry["name"] == "quickstart")
    text = Path(quick["path"]).read_text(encoding="utf-8")
    assert cli.run(["recipes", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(entry["name"] in shown for entry in listed)
    assert cli.run(["recipes", "show", "quickstart"]) == 0
    assert capsys.readouterr().out == text
    assert cli.run(["recipes", "show", "quickstart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["suite"] == "builtin"
    assert cli.run(["recipes", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["properties"]["seed"]["default"] == 42


@pytest.mark.usefixtures("typo")
def test_sweeps_are_listed_shown_and_copied_as_recipes_are(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["recipes", "list", "--json"]) == 0
    kinds = {entry["name"]: entry["kind"] for entry in json.loads(capsys.readouterr().out)}
    assert (kinds["quickstart"], kinds["glue-minilm"]) == ("recipe", "sweep")
    text = (ROOT / "recipes/sweeps/glue-minilm.yaml").read_text()
    assert cli.run(["recipes", "show", "glue-minilm"]) == 0
    assert capsys.readouterr().out == text
    assert cli.run(["recipes", "show", "glue-minilm", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reference"] == "control"
    assert cli.run(["recipes", "copy", "sweeps/glue-minilm"]) == 0
    assert "Next: moc sweep glue-minilm.yaml" in capsys.readouterr().err
    assert Path("glue-minilm.yaml").read_text() == text


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_a_home_that_is_not_there_is_no_traceback(
    command: str, capsys: pytest.CaptureFixture
) -> None:
    assert cli.run([command, "~nobody-of-this-name/mine.yaml"]) == 2
    assert "~nobody-of-this-name/mine.yaml" in capsys.readouterr().err


@pytest.mark.usefixtures("typo")
def test_copy_never_overwrites_unasked(capsys: pytest.CaptureFixture) -> None:
    assert cli.run(["recipes", "copy", "glue/minilm/moc"]) == 0
    assert "Next: moc train glue-minilm-moc.yaml" in capsys.readouterr().err
    copied = Path("glue-minilm-moc.yaml")
    assert copied.read_text() == (ROOT / "recipes/glue/minilm/moc.yaml").read_text()
    copied.write_text("mine")
    assert cli.run(["recipes", "copy", "glue/minilm/moc"]) == 2
    assert "exists already\nHint: Add --force" in capsys.readouterr().err
    assert copied.read_text() == "mine"
    assert cli.run(["recipes", "copy", "glue/minilm/moc", "--force"]) == 0
    assert copied.read_text() != "mine"
    Path("mine").mkdir()
    assert cli.run(["recipes", "copy", "quickstart", "mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == "mine/quickstart.yaml"
    assert cli.run(["recipes", "copy", "quikstart"]) == 2
    assert "did you mean 'quickstart'?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["recipes schema", "recipes show quickstart"])
def test_a_reader_that_leaves_early_is_no_traceback(command: str) -> None:
    """The first is more than a pipe or a buffer holds, the second less."""
    process = subprocess.Popen(
        [*MOC, *command.split()], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    process.stdout.close()
    _, told = process.communicate()
    assert told == b""


def test_ctrl_c_ends_with_130_and_no_traceback(tmp_path: Path) -> None:
    """The signal arrives while the recipe is being read, from a pipe that stays open."""
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen([*MOC, "train", pipe], stderr=subprocess.PIPE, cwd=ROOT)
    with pipe.open("w"):  # opens when the other side does
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert told == b""
    assert process.returncode == 130


def test_an_encoding_without_bars_is_no_traceback() -> None:
    done = subprocess.run(
        [*MOC, "recipes", "list"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
        cwd=ROOT,
    )
    assert b"quickstart" in done.stdout


COUNT = """
import sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += event in ("call", "c_call")
sys.setprofile(count)
import typer, rich, pydantic, yaml
imports = calls
from moc_cli.cli import run
code = run(sys.argv[1:])
sys.setprofile(None)
print("\\nANSWER", code, calls / imports)
"""


@pytest.mark.parametrize(
    ("command", "expected"), [(["--help"], "0"), (["train", "typo.yaml"], "2")]
)
def test_help_and_a_recipe_error_do_little_beside_the_imports(
    command: list[str], expected: str, typo: Path
) -> None:
    """Calls of functions, which are the same in every run; `targets.py` measures the seconds."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, *command],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    code, ratio = done.stdout.splitlines()[-1].split()[1:]
    assert code == expected
    assert float(ratio) < 2.8  # 2.6 when this was written
