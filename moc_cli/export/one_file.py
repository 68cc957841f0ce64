"""Write one Python file from several modules of this package: what is used, and nothing else."""

import ast
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from textwrap import fill

PACKAGE = Path(__file__).resolve().parent.parent
_OWN = f"{PACKAGE.name}."


@dataclass
class _Module:
    """A module's source, and its definitions and imports by name."""

    name: str
    title: str
    lines: list[str]
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    imports: dict[str, tuple[str, ast.alias]] = field(default_factory=dict)


def join_modules(root: str, names: Sequence[str], imports: dict[str, Sequence[str]]) -> str:
    """Return the source of `names` of the module `root` with all that they use of this package.

    Modules follow one another in the order of their imports, each under a line with its title.
    `imports` names what else the file imports, by library. Raises ValueError where two modules
    define the same name differently, or where a module runs statements.
    """
    used: dict[str, set[str]] = {}  # the names to be written, by module
    libraries: dict[str, set[str]] = {
        library: set(imported) for library, imported in imports.items()
    }

    def use(module: _Module, name: str) -> None:
        names = used.setdefault(module.name, set())
        if name in names or name not in module.definitions | module.imports:
            return
        names.add(name)
        if name in module.definitions:
            for dependency in _names_in(module.definitions[name]):
                use(module, dependency)
            return
        source, alias = module.imports[name]
        if source.startswith(_OWN):
            use(_read(source), alias.name)
        else:
            libraries.setdefault(source, set()).add(ast.unparse(alias))

    for name in names:
        use(_read(root), name)
    written = {name: used[name] & _read(name).definitions.keys() for name in _in_order(root, used)}
    owners: dict[str, str] = {}
    for module, definitions in written.items():
        for name in definitions:
            if owners.setdefault(name, module) != module:
                raise ValueError(f"'{name}' stands in {owners[name]} and in {module}")
    parts = [_write(_read(module), definitions) for module, definitions in written.items()]
    return "\n\n\n".join([_imports(libraries), *parts]) + "\n"


@cache
def _read(name: str) -> _Module:
    path = PACKAGE.joinpath(*name.removeprefix(_OWN).split(".")).with_suffix(".py")
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    title = (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " ")
    module = _Module(name, title, text.splitlines())
    for node in tree.body[1:]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            source = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                module.imports[alias.asname or alias.name] = source, alias
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            module.definitions[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                module.definitions[ast.unparse(target)] = node
        else:
            raise ValueError(f"{path.name}, line {node.lineno}: only definitions can be joined")
    return module


@cache
def _names_in(node: ast.stmt) -> set[str]:
    """The names that a definition reads, those in quoted annotations too."""
    parts = list(ast.walk(node))
    names = {part.id for part in parts if isinstance(part, ast.Name)}
    return names | {str(part.value) for part in parts if isinstance(part, ast.Constant)}


def _in_order(root: str, names: Collection[str]) -> list[str]:
    """The names of the modules, each after those that it imports from."""
    order: list[str] = []

    def visit(name: str) -> None:
        if name in names and name not in order:
            for source in sorted({source for source, _ in _read(name).imports.values()}):
                visit(source)
            order.append(name)

    visit(root)
    return order


def _write(module: _Module, names: Collection[str]) -> str:
    """These definitions as they stand in the module, with the comments above them."""
    path = module.name.removeprefix(_OWN).replace(".", "/") + ".py"
    text = fill(f"{path}: {module.title}", 98, initial_indent="# ", subsequent_indent="# ")
    nodes = [module.definitions[name] for name in names]
    last = 0
    for node in sorted(nodes, key=lambda node: node.lineno):
        above = [decorator.lineno for decorator in getattr(node, "decorator_list", [])]
        first = min([node.lineno, *above]) - 1
        while module.lines[first - 1].startswith("#"):
            first -= 1
        text += "\n" if first == last else "\n\n\n"  # constants may stand one under another
        last = node.end_lineno or node.lineno
        text += "\n".join(module.lines[first:last])
    return text


def _imports(libraries: dict[str, set[str]]) -> str:
    """Import statements: the standard library's, then others'."""
    plain = sorted(libraries.get("", ()))
    lines = {f"import {name}": name for name in plain}
    for source in sorted(set(libraries) - {""}):
        names = sorted(libraries[source])
        line = f"from {source} import {', '.join(names)}"
        if len(line) > 100:
            line = f"from {source} import (\n" + "".join(f"    {name},\n" for name in names) + ")"
        lines[line] = source
    parts: tuple[list[str], list[str]] = [], []
    for line, source in lines.items():
        parts[source.split(".")[0] not in sys.stdlib_module_names].append(line)
    return "\n\n".join("\n".join(part) for part in parts)
