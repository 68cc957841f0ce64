"""The rooms and the one direction of their imports; what stays light; how long a file may be."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.machine import ROOT

PACKAGE = ROOT / "moc_cli"
FILES = sorted(PACKAGE.rglob("*.py"))

# A room imports only from floors above its own in this list; rooms of one floor ignore each other.
FLOORS = [
    {"__init__"},
    {"errors"},
    {"files"},
    {"results", "signals", "processes"},
    {"run_files"},
    {"recipe", "report", "nn", "builtin"},
    {"models"},
    {"methods"},
    {"adapter"},
    {"runs", "data"},
    {"scoring"},
    {"kinds"},
    {"training"},
    {"planning", "load_run", "launching"},
    {"peft"},
    {"evaluation", "inspection", "export", "comparison", "serving", "benchmark"},
    {"sweep"},
    {"api"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "numpy", "sklearn", "scipy"}
LIGHT = {
    "errors",
    "files",
    "results",
    "run_files",
    "recipe",
    "report",
    "cli",
    "runs",
    "__init__",
    "__main__",
}
LIGHT_FILES = {
    *("adapter/folder.py", "adapter/config.py", "adapter/__init__.py"),
    "training/changes.py",
}
# The rooms and files that may import a library.
AT_HOME = {
    "peft": {"methods/half.py", "methods/low_rank.py", "peft"},
    "typer": {"cli"},
    "bitsandbytes": {"models/quantization.py"},  # which imports it where it is asked for
    "pydantic": {"recipe", "run_files.py", "adapter/config.py", "training/checkpoint.py"},
    "rich": {"report", "cli"},
    "datasets": {"data"},
    "accelerate": {"training", "scoring/batch_size.py", "benchmark", "processes.py", "launching"},
}
# The rooms that take values out of a recipe, not a recipe or its sections; only a method's own
# section goes to the rooms that place it.
WITHOUT_RECIPE = {
    "nn",
    "models",
    "methods",
    "adapter",
    "scoring",
    "kinds",
    "peft",
    "report",
    "launching",
    "api",
}
RECIPE = ("moc_cli.recipe.schema", "moc_cli.recipe.sections")
LONGEST = 350  # lines; at 300 a file is worth another look


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, *, at_start: bool = False, for_types: bool = False) -> Iterator[str]:
    """Yield the modules that a file imports; `at_start` leaves out those inside functions,
    `for_types` adds those that only type checkers see.
    """
    pending: list[ast.AST] = [tree(path)]
    inner = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    for node in pending:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            around = path.relative_to(ROOT).parts[: -node.level]
            yield ".".join([*around, *filter(None, [node.module])])
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        if (for_types or not for_types_only(node)) and not (at_start and isinstance(node, inner)):
            pending.extend(ast.iter_child_nodes(node))


def rooms_imported(path: Path) -> set[str]:
    """Return the rooms of ours that a file imports from."""
    parts = [name.split(".") for name in imports(path)]
    inside = {part[1] for part in parts if part[0] == "moc_cli" and len(part) > 1}
    return {name if name in FLOOR else "__init__" for name in inside}


def import_circle(files: list[Path]) -> list[str]:
    """Return modules that import each other in a circle, wherever the imports stand; [] if none."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
    }
    graph = {
        module: {
            name if name in modules else name.rpartition(".")[0]
            for name in imports(path, for_types=True)
        }
        for module, path in modules.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def offences(path: Path) -> Iterator[str]:
    """Yield what is wrong with a file."""
    own, name = room(path), path.relative_to(PACKAGE).as_posix()
    if own not in FLOOR:
        yield f"{name}: the new room {own} needs its place in FLOORS"
        return
    for other in sorted(rooms_imported(path) - {own}):
        if FLOOR[other] >= FLOOR[own]:
            yield f"{name}: {own} may not import {other}"
    if own in LIGHT or name in LIGHT_FILES:
        for heavy in sorted({name.split(".")[0] for name in imports(path, at_start=True)} & HEAVY):
            yield f"{name}: imports {heavy} at its start"
    libraries = {name.split(".")[0] for name in imports(path)}
    for library, places in AT_HOME.items():
        if library in libraries and own not in places and name not in places:
            yield f"{name}: {library} belongs in {', '.join(sorted(places))}"
    if own in WITHOUT_RECIPE:
        for module in sorted(imports(path, for_types=True)):
            if module.startswith(RECIPE):
                yield f"{name}: {own} takes values, not {module}"
    if own == "nn":
        for library in sorted(libraries - {"moc_cli", "torch"} - set(sys.stdlib_module_names)):
            yield f"{name}: nn knows torch alone, not {library}"
    text = path.read_text(encoding="utf-8")
    if (lines := len(text.splitlines())) > LONGEST:
        yield f"{name}: {lines} lines, at most {LONGEST}"
    if not ast.get_docstring(tree(path)) and len(text) >= 99:
        yield f"{name}: has no docstring"


def test_every_file_keeps_to_the_rules() -> None:
    found = [offence for path in FILES for offence in offences(path)]
    assert not found, "\n".join(found)
    assert import_circle(FILES) == []


def test_the_checks_see_what_they_forbid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that breaks the rules is found out, wherever in it the import stands."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "moc_cli")
    path = tmp_path / "moc_cli" / "nn" / "bad.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "from typing import TYPE_CHECKING\nimport torch\nfrom . import gate\n"
        "if TYPE_CHECKING:\n    from moc_cli.cli import run\n"
        "def f():\n    import datasets\n    from moc_cli import training\n" + "\n" * LONGEST
    )
    assert rooms_imported(path) == {"nn", "training"}
    assert "datasets" not in set(imports(path, at_start=True))
    assert "torch" in set(imports(path, at_start=True))
    assert list(offences(path)) == [
        "nn/bad.py: nn may not import training",
        "nn/bad.py: datasets belongs in data",
        "nn/bad.py: nn knows torch alone, not datasets",
        "nn/bad.py: 358 lines, at most 350",
        "nn/bad.py: has no docstring",
    ]
    light = tmp_path / "moc_cli" / "report" / "light.py"
    light.parent.mkdir()
    light.write_text('"""A table."""\nimport scipy.stats\n')
    assert list(offences(light)) == ["report/light.py: imports scipy at its start"]
    low = tmp_path / "moc_cli" / "scoring" / "low.py"
    low.parent.mkdir()
    low.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
        "    from moc_cli.recipe.schema import Recipe\n"
    )
    assert "scoring/low.py: scoring takes values, not moc_cli.recipe.schema.Recipe" in offences(low)
    stray = tmp_path / "moc_cli" / "attic" / "old.py"
    stray.parent.mkdir()
    stray.write_text("")
    assert list(offences(stray)) == ["attic/old.py: the new room attic needs its place in FLOORS"]


@pytest.mark.parametrize(
    "back",
    [
        "from moc_cli.nn.gate import Route\n",
        "def f():\n    from moc_cli.nn import gate\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import moc_cli.nn.gate\n",
    ],
)
def test_a_circle_is_seen_wherever_its_imports_stand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back: str
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    folder = tmp_path / "moc_cli" / "nn"
    folder.mkdir(parents=True)
    files = [folder / "gate.py", folder / "vote.py"]
    files[0].write_text("from moc_cli.nn import vote\n")
    files[1].write_text("import torch\n")
    assert import_circle(files) == []
    tree.cache_clear()
    files[1].write_text(back)
    assert set(import_circle(files)) == {"moc_cli.nn.gate", "moc_cli.nn.vote"}


QUIET = """
import sys
from moc_cli.cli import run
for line in sys.argv[1:]:
    code = run(line.split())
    loaded = sorted({name.split(".")[0] for name in sys.modules} & %r)
    print("\\nANSWER", line, code, loaded)
"""
CODES = {
    "--help": 0,
    "--version": 0,
    "train --help": 0,
    "recipes list": 0,
    "recipes show quickstart --json": 0,
    "recipes schema": 0,
    "train quickstart --set train.max_step=3": 2,
    "train nowhere.yaml": 2,
    "trian": 2,
    "sweep quickstart --vary method.top_k=0,1 --dry-run": 0,
}


def test_quick_commands_import_nothing_heavy() -> None:
    """One process for all: what one of them imports, the lines after it show too."""
    done = subprocess.run(
        [sys.executable, "-c", QUIET % HEAVY, *CODES],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert answers == [f"ANSWER {line} {code} []" for line, code in CODES.items()]
