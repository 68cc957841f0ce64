"""YAML text to plain values, with the line of every key.

The scalars are those of YAML 1.2: `1e-4` is a number, `no` and `on` are words, `010` is ten and
`1:30` is text, where PyYAML's own loader would give a text, a boolean, eight and ninety.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

Path = tuple[str, ...]

_TAGS = tuple(f"tag:yaml.org,2002:{kind}" for kind in ("str", "map", "seq"))
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = ("", "~", "null", "Null", "NULL")
_INT = re.compile(r"[-+]?[0-9][0-9_]{0,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Resolves no scalar, so that `1e-4` and `no` arrive as written; refuses aliases.

    A few nested aliases can stand for gigabytes, and a recipe needs none.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            problem = "aliases (*name) are not read in recipes; write the value out"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        return super().compose_node(parent, index)


class Mistake(NamedTuple):
    """One thing wrong in the text: line (from 1, None if unknown), dotted key, what and why."""

    line: int | None
    key: str
    message: str


@dataclass
class Read:
    """The values, the line of each path, what was wrong in the text itself, and where a value
    could not be made out, so that nothing more need be said about it.
    """

    value: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    mistakes: list[Mistake] = field(default_factory=list)
    unread: set[Path] = field(default_factory=set)


def read_yaml(text: str) -> Read:
    """Return the one document in `text`; never raises, mistakes are in the result."""
    result = Read()
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
        if node is not None:
            result.value = _build(node, (), result)
    except yaml.MarkedYAMLError as error:
        result.mistakes.append(_syntax(error, text))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = ord(error.character) if isinstance(error.character, str) else error.character
        result.mistakes.append(Mistake(line, "", f"the character U+{code:04X} is not allowed"))
    except RecursionError:
        result.mistakes.append(Mistake(None, "", "nested too deeply"))
    return result


def _build(node: yaml.Node, path: Path, into: Read) -> Any:
    """Return the value of `node`, noting lines and mistakes under `path`."""
    line = node.start_mark.line + 1
    into.lines.setdefault(path, line)
    if node.tag not in _TAGS:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        message = f"the tag {tag} is not read in recipes; leave it out"
        into.mistakes.append(Mistake(line, ".".join(path), message))
        into.unread.add(path)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, into)
    if isinstance(node, yaml.SequenceNode):
        return [_build(item, (*path, str(i)), into) for i, item in enumerate(node.value)]
    return parse_scalar(node.value) if node.style is None else node.value


def _mapping(node: yaml.MappingNode, path: Path, into: Read) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            into.mistakes.append(Mistake(line, ".".join(path), "a key must be a word"))
            continue
        key = key_node.value
        here = (*path, key)
        if key in values:
            first = into.lines[here]
            message = f"given twice, in lines {first} and {line}; keep one"
            into.mistakes.append(Mistake(line, ".".join(here), message))
            continue
        into.lines[here] = line
        values[key] = _build(value_node, here, into)
    return values


def parse_scalar(text: str) -> Any:
    """Return an unquoted YAML 1.2 scalar as null, boolean, number or text."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _INFINITE.fullmatch(text):
        return math.nan if "n" in text[1:2].lower() else float(text.replace(".", "", 1))
    return text


def _syntax(error: yaml.MarkedYAMLError, text: str) -> Mistake:
    """Say in one sentence what a YAML error means."""
    mark = error.problem_mark or error.context_mark
    if "end of stream" in (error.problem or "") and error.context_mark:
        mark = error.context_mark  # a quote left open: where it was opened
    line = mark.line + 1 if mark else None
    problem = error.problem or error.context or "not readable as YAML"
    lines = text.splitlines()
    here = lines[line - 1] if line is not None and line <= len(lines) else ""
    if "\t" in here[: len(here) - len(here.lstrip())] or r"'\t'" in problem:
        problem = "a tab cannot start a token in YAML; indent with spaces"
    elif "expected a single document" in (error.context or ""):
        problem = "a recipe is one document; take out the second '---'"
    elif error.context and error.context_mark and error.context_mark.line + 1 != line:
        problem = f"{problem} ({error.context} in line {error.context_mark.line + 1})"
    elif error.context:
        problem = f"{problem} ({error.context})"
    return Mistake(line, "", f"not valid YAML: {problem}".replace("'<stream end>'", "the end"))
