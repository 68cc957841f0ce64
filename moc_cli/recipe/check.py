"""Validate raw values against the schema and gather every mistake, not only the first kind."""

import copy
from typing import Any, NamedTuple

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from moc_cli.recipe.messages import locate, sentence
from moc_cli.recipe.methods import METHODS
from moc_cli.recipe.reader import Path
from moc_cli.recipe.rules import broken_rules
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import nearest

_LATER = {"rules_later": True}

# Stand-ins for what has no default, so that rules about everything else can still be checked.
_STAND_INS: dict[Path, Any] = {
    ("model", "model_name_or_path"): "?",
    ("data", "suite"): "builtin",
    ("data", "tasks"): ["world"],
    ("output", "output_dir"): "?",
}


class Finding(NamedTuple):
    """A mistake at a path of the recipe."""

    path: Path
    message: str


def check(raw: dict[str, Any]) -> tuple[Recipe | None, list[Finding]]:
    """Return the recipe, or None and every wrong field and impossible combination in `raw`."""
    recipe: Recipe | None
    broken: set[Path] = set()
    findings: list[Finding] = []
    try:
        recipe = Recipe.model_validate(raw, context=_LATER)
    except ValidationError as error:
        details = error.errors(include_url=False)
        findings = [Finding(*sentence(detail)) for detail in (*details, *_under_meant_method(raw))]
        findings = list(dict.fromkeys(findings))
        recipe, broken = _mend(raw, error)
    for rule in broken_rules(recipe) if recipe is not None else ():
        read = [tuple(key.split(".")) for key in rule.read]
        if not any(_related(path, one) for path in broken for one in read):
            findings.append(Finding(tuple(rule.key.split(".")), rule.message))
    return (None if findings else recipe), findings


def _under_meant_method(raw: dict[str, Any]) -> list[ErrorDetails]:
    """Return the errors inside a method section whose name is misspelt, under the name meant."""
    method = raw.get("method")
    if not isinstance(method, dict):
        return []
    name = method.get("name")
    if not isinstance(name, str) or name in METHODS:
        return []
    meant = nearest(name, METHODS)
    if meant is None:
        return []
    try:
        Recipe.model_validate({**raw, "method": {**method, "name": meant}}, context=_LATER)
    except ValidationError as error:
        return [one for one in error.errors(include_url=False) if one["loc"][0] == "method"]
    return []


def _mend(raw: dict[str, Any], error: ValidationError) -> tuple[Recipe | None, set[Path]]:
    """Return `raw` as a recipe without its broken values, and the paths that were broken."""
    values = copy.deepcopy(raw)
    broken: set[Path] = set()
    for _ in range(6):
        for detail in error.errors(include_url=False):
            path, annotation, around = locate(detail["loc"])
            broken.add(path)
            if detail["type"] == "missing":
                _put(values, path, _STAND_INS.get(path, {}))
                continue
            if annotation is None and around is not None:
                meant = nearest(path[-1], around.model_fields)
                broken |= {(*path[:-1], meant)} if meant else set()
            _drop(values, path)
        try:
            return Recipe.model_validate(values, context=_LATER), broken
        except ValidationError as next_error:
            error = next_error
    return None, broken


def _related(one: Path, other: Path) -> bool:
    shorter = min(len(one), len(other))
    return one[:shorter] == other[:shorter]


def _parent(values: dict[str, Any], path: Path) -> Any:
    current: Any = values
    for part in path[:-1]:
        if not isinstance(current, dict):
            return None
        if current.get(part) is None:
            current[part] = {}
        current = current[part]
    return current


def _put(values: dict[str, Any], path: Path, value: Any) -> None:
    parent = _parent(values, path)
    if isinstance(parent, dict):
        parent[path[-1]] = value


def _drop(values: dict[str, Any], path: Path) -> None:
    """Take out the value at `path`; where it is part of a list, the whole list."""
    parent = _parent(values, path)
    if isinstance(parent, dict):
        parent.pop(path[-1], None)
    elif len(path) > 1:
        _drop(values, path[:-1])
