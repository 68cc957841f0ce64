"""The rooms and the one direction of their imports; what stays light; how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.machine import ROOT

PACKAGE = ROOT / "moc_cli"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

# A room imports only from floors above its own in this list; rooms of one floor ignore each other.
FLOORS = [
    {"__init__"},
    {"errors"},
    {"files"},
    {"recipe", "report", "nn", "builtin"},
    {"models"},
    {"methods"},
    {"adapter"},
    {"runs", "data"},
    {"scoring"},
    {"evaluation"},
    {"training"},
    {"load_run"},
    {"peft"},
    {"inspection", "export", "comparison", "serving"},
    {"api"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "numpy", "sklearn", "scipy"}
LIGHT = {"errors", "files", "recipe", "report", "cli", "runs", "__init__", "__main__"}
LIGHT_FILES = {"adapter/folder.py", "adapter/config.py", "adapter/__init__.py"}
LONGEST = 350  # lines; at 300 a file is worth another look


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(path: Path, *, at_start: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports; `at_start` leaves out those inside functions."""
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    inner = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    for node in pending:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            around = path.relative_to(ROOT).parts[: -node.level]
            yield ".".join([*around, *filter(None, [node.module])])
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if not for_types_only(node) and not (at_start and isinstance(node, inner)):
            pending.extend(ast.iter_child_nodes(node))


def rooms_imported(path: Path) -> set[str]:
    """Return the rooms of ours that a file imports from."""
    parts = [name.split(".") for name in imports(path)]
    inside = {part[1] for part in parts if part[0] == "moc_cli" and len(part) > 1}
    return {name if name in FLOOR else "__init__" for name in inside}


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_room_imports_only_what_comes_before_it(path: Path) -> None:
    own = room(path)
    assert own in FLOOR, "a new room needs its place in FLOORS"
    wrong = {name for name in rooms_imported(path) - {own} if FLOOR[name] >= FLOOR[own]}
    assert not wrong, f"{own} may not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_light_rooms_import_nothing_heavy_at_their_start(path: Path) -> None:
    if room(path) in LIGHT or path.relative_to(PACKAGE).as_posix() in LIGHT_FILES:
        assert not {name.split(".")[0] for name in imports(path, at_start=True)} & HEAVY


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)}
    own, name = room(path), path.relative_to(PACKAGE).as_posix()
    assert "peft" not in outside or name in ("methods/low_rank.py", "peft.py")
    assert "typer" not in outside or own == "cli"
    assert "pydantic" not in outside or own == "recipe" or name == "adapter/config.py"
    assert "rich" not in outside or own in ("report", "cli")
    assert "datasets" not in outside or own == "data"
    assert "accelerate" not in outside or own == "training"
    if own == "nn":
        assert outside - {"moc_cli"} <= {"torch"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_can_be_held_in_the_head(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    assert (
        ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.stat().st_size < 99
    )


def test_the_checks_see_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that breaks the rules is found out, wherever in it the import stands."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "moc_cli")
    path = tmp_path / "moc_cli" / "nn" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch\nfrom . import gate\n"
        "if TYPE_CHECKING:\n    from moc_cli.cli import run\n"
        "def f():\n    import datasets\n    from moc_cli import training\n"
    )
    assert rooms_imported(path) == {"nn", "training"}
    assert "datasets" in set(imports(path))
    assert "datasets" not in set(imports(path, at_start=True))
    assert "torch" in set(imports(path, at_start=True))
    with pytest.raises(AssertionError, match="nn may not import training"):
        test_a_room_imports_only_what_comes_before_it(path)


QUIET = """
import sys
from moc_cli.cli import run
code = run(sys.argv[1:])
loaded = sorted({name.split(".")[0] for name in sys.modules} & %r)
print("\\nANSWER", code, loaded)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["train", "--help"], 0),
        (["recipes", "list"], 0),
        (["recipes", "show", "quickstart", "--json"], 0),
        (["recipes", "schema"], 0),
        (["train", "quickstart", "--set", "train.max_step=3"], 2),
        (["train", "nowhere.yaml"], 2),
        (["trian"], 2),
    ],
)
def test_quick_commands_import_nothing_heavy(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUIET % HEAVY, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[-1] == f"ANSWER {code} []"
