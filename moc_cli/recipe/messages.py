"""Say what is wrong with one value of a recipe and what is allowed, in words from the schema."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moc_cli.recipe.methods import METHODS, MethodConfig
from moc_cli.recipe.reader import Path
from moc_cli.recipe.schema import RecipeFile
from moc_cli.recipe.suggest import choices, nearest
from moc_cli.recipe.types import HUGE, LARGEST


class Explanation(NamedTuple):
    """The path of a mistake, a sentence about it, and for an unknown key the path that was meant
    (otherwise the same path).
    """

    path: Path
    message: str
    meant: Path


def explain(error: ErrorDetails) -> Explanation:
    """Return where in the recipe a pydantic error lies, and what was found and what is allowed."""
    path, annotation, section = _locate(error["loc"])
    value = error["input"]
    allowed_words = _words(annotation)
    if annotation is None and section is not None:
        near = nearest(path[-1], section.model_fields)
        return Explanation(path, _unknown_key(path, section), (*path[:-1], near or path[-1]))
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, "name")
        message = method_name(value.get("name") if isinstance(value, dict) else value)
    elif error["type"] == "missing":
        message = _missing(annotation, section, path)
    elif isinstance(value, str) and allowed_words:
        message = f"found {show(value)}{choices(value, allowed_words)}"
    elif error["type"] in ("nul", "home"):
        message = f"found {show(value)}; {error['msg']}"
    else:
        message = f"found {show(value)}; allowed: {allowed_values(annotation)}"
        limits = error.get("ctx", {})
        if (limit := limits.get("le", limits.get("lt"))) in (LARGEST, HUGE):
            message += f", and at most {limit:.10g}"
    return Explanation(path, message, path)


def method_name(name: Any) -> str:
    """Return the sentence about a `name` that no method has."""
    if isinstance(name, str):
        return f"found {show(name)}{choices(name, METHODS)}"
    start = "missing" if name is None else f"found {show(name)}"
    return f"{start}; allowed: {', '.join(METHODS)}"


def show(value: Any) -> str:
    """Return `value` in short, as the user wrote it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "a section"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def allowed_values(annotation: Any) -> str:
    """Return what a field allows, for example "a whole number of at least 1, or null"."""
    field = FieldInfo.from_annotation(annotation)
    annotation = field.annotation
    bounds: dict[str, Any] = {
        name: bound
        for item in field.metadata
        for name in _BOUNDS
        if (bound := getattr(item, name, None)) not in (None, LARGEST, HUGE)
    }
    arguments = get_args(annotation)
    if allowed_words := _words(annotation):
        return ", ".join(allowed_words)
    if annotation == MethodConfig:
        return f"one of {', '.join(METHODS)}, or a section with a name"
    if get_origin(annotation) in _UNIONS:
        return ", or ".join(map(allowed_values, arguments))
    if get_origin(annotation) is list:
        item, plural = arguments[0], {str: "texts", int: "whole numbers"}
        arms = [bare(arm) for arm in (get_args(item) if get_origin(item) in _UNIONS else [item])]
        if all(arm in plural for arm in arms):
            return f"a list of {' or '.join(plural[arm] for arm in arms)}"
        return f"a list of {allowed_values(item)}"
    if get_origin(annotation) is dict:
        return "a section with task names as keys"
    if issubclass(annotation, BaseModel):
        return f"a section with the keys {', '.join(annotation.model_fields)}"
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if "min_length" in bounds:
        limits = "that is not empty"
    elif "ge" in bounds and "le" in bounds:
        limits = f"from {bounds['ge']:g} to {bounds['le']:.10g}"
    else:
        parts = (f"{_BOUNDS[name]} {bounds[name]:g}" for name in _BOUNDS if name in bounds)
        limits = " and ".join(parts)
    return f"{kind[annotation]} {limits}".rstrip()


_BOUNDS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below", "min_length": ""}
_UNIONS = (Union, types.UnionType)


def bare(annotation: Any) -> Any:
    """Return an annotation without its bounds and without `| None`."""
    while arguments := get_args(annotation):
        optional = get_origin(annotation) in _UNIONS and arguments[1:] == (types.NoneType,)
        if get_origin(annotation) is not Annotated and not optional:
            break
        annotation = arguments[0]
    return annotation


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of `Section` or `Section | None`; None for any other annotation."""
    plain = bare(annotation)
    return plain if isinstance(plain, type) and issubclass(plain, BaseModel) else None


def _locate(loc: tuple[int | str, ...]) -> tuple[Path, Any, type[BaseModel] | None]:
    """Follow a pydantic location: the path in the recipe, the annotation there, the section around.

    The annotation is None at an unknown key. Branches of a union are not part of the path.
    """
    path: Path = ()
    annotation: Any = RecipeFile
    enclosing: type[BaseModel] | None = None
    for part in loc:
        plain = bare(annotation)
        if plain == MethodConfig and part in METHODS:
            annotation = METHODS[str(part)]
            continue
        if section := section_of(plain):
            enclosing = section
            field = section.model_fields.get(str(part))
            annotation = field.rebuild_annotation() if field else None
        elif get_origin(plain) in (list, dict):
            annotation = get_args(plain)[-1]
        else:
            break
        path = (*path, str(part))
    return path, annotation, enclosing


def _words(annotation: Any) -> list[str]:
    """Return the words a field allows, null among them; none if it allows anything else."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if annotation is types.NoneType:
        return ["null"]
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    arms = [_words(arm) for arm in get_args(annotation)]
    if get_origin(annotation) in _UNIONS and all(arms):
        return [word for arm in arms for word in arm]
    return []


def _missing(annotation: Any, enclosing: type[BaseModel] | None, path: Path) -> str:
    section = section_of(annotation)
    if section is None:
        about = enclosing.model_fields[path[-1]].description if enclosing else ""
        return f"missing, and it has no default ({about}); allowed: {allowed_values(annotation)}"
    required = [name for name, field in section.model_fields.items() if field.is_required()]
    return f"missing section; it needs {', '.join(required)}"


def _unknown_key(path: Path, enclosing: type[BaseModel]) -> str:
    key, allowed = path[-1], list(enclosing.model_fields)
    holders = [name for name, method in METHODS.items() if key in method.model_fields]
    if enclosing in METHODS.values() and holders:
        its_name = enclosing.model_fields["name"].default
        return (
            f"method '{its_name}' has no such key (it belongs to {', '.join(holders)}); "
            f"allowed: {', '.join(allowed)}"
        )
    home = next(_homes(key), None)
    if home is not None and nearest(key, allowed) is None:
        return f"unknown key; it belongs under '{home}'; allowed here: {', '.join(allowed)}"
    return f"unknown key{choices(key, allowed)}"


def _homes(key: str) -> Iterator[str]:
    """Yield the sections that have `key`, outer ones first."""
    pending: list[tuple[Path, type[BaseModel]]] = [((), RecipeFile)]
    for path, section in pending:
        if path and key in section.model_fields:
            yield ".".join(path)
        for name, field in section.model_fields.items():
            inner = METHODS.values() if name == "method" else [section_of(field.annotation)]
            pending.extend(((*path, name), cls) for cls in inner if cls is not None)
