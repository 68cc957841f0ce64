"""YAML text to plain values, with the line of every key.

Scalars are those of YAML 1.2: `1e-4` is a number, `no` and `on` are texts, `010` is ten and `1:30`
is a text. PyYAML's own loader reads YAML 1.1: a text, two booleans, eight and ninety.
"""

import json
import pathlib
import re
from typing import Any, NamedTuple

import yaml

from moc_cli.errors import Problem, RecipeError

Path = tuple[str, ...]

_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INT = re.compile(r"[-+]?[0-9](_?[0-9]){0,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Mistake(NamedTuple):
    """A mistake in the text: its line (from 1; 0 if unknown), its path if known, what is wrong."""

    line: int
    path: Path
    message: str


class Document(NamedTuple):
    """The value of a YAML text, the line of each path in it, and the mistakes in the text."""

    value: Any
    lines: dict[Path, int]
    mistakes: list[Mistake]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Leaves scalars as they are written. Reports tags; refuses aliases, because a few nested ones
    can stand for gigabytes.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}

    def __init__(self, text: str, mistakes: list[Mistake]) -> None:
        super().__init__(text)
        self.mistakes = mistakes

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            problem = "aliases (*name) are not allowed in recipes; write the value out"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)
        if getattr(event, "tag", None):
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            message = f"tags are not allowed in recipes; leave out {tag}"
            self.mistakes.append(Mistake(event.start_mark.line + 1, (), message))
            event.tag = None
        return super().compose_node(parent, index)


def read_file(file: pathlib.Path, name: str) -> Document:
    """Return what is in a file that is called `name`. Raises RecipeError where it is no text."""
    try:
        return read_yaml(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = Problem(f"{name}:{line}", "", "not UTF-8 text; save the recipe as UTF-8")
        raise RecipeError.of([problem]) from error


def read_yaml(text: str) -> Document:
    """Return the one document in `text`. Never raises: mistakes are in the result."""
    document = Document(None, {}, [])
    try:
        node = _Loader(text, document.mistakes).get_single_node()
        return document if node is None else document._replace(value=_build(node, (), document))
    except yaml.MarkedYAMLError as error:
        mistake = _syntax(error, text)
    except yaml.reader.ReaderError as error:
        code = ord(error.character) if isinstance(error.character, str) else error.character
        line = text.count("\n", 0, error.position) + 1
        mistake = Mistake(line, (), f"the character U+{code:04X} is not allowed")
    except RecursionError:
        mistake = Mistake(0, (), "nested too deeply")
    document.mistakes.append(mistake)
    return document


def as_text(value: Any) -> str:
    """Return a value as a text that `--set` reads back to it, without quotes where it can."""
    plain = isinstance(value, str) and read_yaml(value).value == value
    return value if plain else json.dumps(value, ensure_ascii=False)


def parse_scalar(text: str) -> Any:
    """Return an unquoted YAML 1.2 scalar as null, boolean, number or text."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    return text


def _build(node: yaml.Node, path: Path, document: Document) -> Any:
    """Return the value of `node`; note lines and mistakes in `document`."""
    lines, mistakes = document.lines, document.mistakes
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, str(i)), document) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.ScalarNode):
        return parse_scalar(node.value) if node.style is None else node.value
    values: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            mistakes.append(Mistake(line, path, "a key must be a text"))
            continue
        inner = (*path, key.value)
        if key.value in values:
            message = f"given twice, in lines {lines[inner]} and {line}; keep one"
            mistakes.append(Mistake(line, inner, message))
            continue
        lines[inner] = line
        values[key.value] = _build(value, inner, document)
    return values


def _syntax(error: yaml.MarkedYAMLError, text: str) -> Mistake:
    """Say in one sentence what a YAML error means."""
    mark = error.problem_mark or error.context_mark
    if "end of stream" in (error.problem or "") and error.context_mark:
        mark = error.context_mark  # a quote left open: where it was opened
    line = mark.line + 1 if mark else 0
    problem = error.problem or error.context or "not readable as YAML"
    written = text.splitlines()[line - 1 : line] if mark else []
    if re.match(r"\s*\t", "".join(written)) or r"'\t'" in problem:
        problem = "a tab cannot start a token in YAML; indent with spaces"
    elif "expected a single document" in (error.context or ""):
        problem = "a recipe is one document; remove the second '---'"
    elif error.context:
        start = error.context_mark.line + 1 if error.context_mark else line
        problem += f" ({error.context}{'' if start == line else f' in line {start}'})"
    return Mistake(line, (), f"not valid YAML: {problem}".replace("'<stream end>'", "the end"))
