"""What is wrong with one value, and what would be right, in words taken from the schema."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from moc_cli.recipe.methods import METHODS
from moc_cli.recipe.reader import Path
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import choices, nearest

PER_TASK = "per_task"


def locate(loc: tuple[int | str, ...]) -> tuple[Path, Any, type[BaseModel] | None]:
    """Follow a pydantic location: the recipe's path, the annotation there, the section around it.

    The annotation is None at an unknown key. Branches of a union are no part of the path.
    """
    path: Path = ()
    current: Any = Recipe
    around: type[BaseModel] | None = None
    for part in loc:
        section = _section(current)
        if section is not None:
            around, path = section, (*path, str(part))
            field = section.model_fields.get(str(part))
            if field is None:
                return path, None, around
            current = Annotated[(field.annotation, field)]
        elif part in METHODS and path == ("method",):
            current = METHODS[str(part)]
        elif isinstance(part, int):
            path, current = (*path, str(part)), _item(current)
        else:
            break
    return path, current, around


def sentence(error: ErrorDetails) -> tuple[Path, str]:
    """Return the path of a pydantic error and one sentence about it."""
    path, annotation, around = locate(error["loc"])
    value = error["input"]
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _method_name(path, value)
    if error["type"] == "missing":
        return path, _missing(annotation, around, path)
    if annotation is None and around is not None:
        return path, _unknown_key(path, around)
    if error["type"] in ("processes", "combination"):
        return path, error["msg"]
    words = list(_words(annotation))
    if isinstance(value, str) and words:
        return path, f"found {found(value)}{choices(value, _options(annotation, words))}"
    return path, f"found {found(value)}; allowed: {describe(annotation)}"


def found(value: Any) -> str:
    """Return a short picture of `value` as the user wrote it."""
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


def describe(annotation: Any) -> str:
    """Return what a field allows: "a whole number of at least 1, or null"."""
    plain, fields = _peel(annotation)
    if get_origin(plain) in (Union, types.UnionType):
        arms = [arm for arm in get_args(plain) if arm is not type(None)]
        sections = [arm for arm in arms if _section(arm)]
        if sections and len(sections) == len(arms) > 1:
            return f"one of {', '.join(METHODS)}, or a section with a name"
        null = ["null"] if type(None) in get_args(plain) else []
        return ", or ".join([*(describe(arm) for arm in arms), *null])
    section = _section(plain)
    if section is not None:
        return f"a section with the keys {', '.join(section.model_fields)}"
    if get_origin(plain) is Literal:
        return ", ".join(str(word) for word in get_args(plain))
    if get_origin(plain) is list:
        item = _peel(_item(plain))[0]
        return "a list of texts" if item is str else f"a list of {describe(item)}"
    kind = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[plain]
    return f"{kind}{_bounds(fields)}"


def _bounds(fields: list[FieldInfo]) -> str:
    limits: dict[str, Any] = {}
    for field in fields:
        for rule in field.metadata:
            for name in ("ge", "gt", "le", "lt", "min_length"):
                if getattr(rule, name, None) is not None:
                    limits[name] = getattr(rule, name)
    if "min_length" in limits:
        return " that is not empty"
    if "ge" in limits and "le" in limits:
        return f" from {limits['ge']:g} to {limits['le']:.10g}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    told = [f"{word} {limits[name]:g}" for name, word in words.items() if name in limits]
    return f" {' and '.join(told)}" if told else ""


def _method_name(path: Path, value: Any) -> tuple[Path, str]:
    name = value.get("name") if isinstance(value, dict) else value
    if name is None:
        return (*path, "name"), f"missing; allowed: {', '.join(METHODS)}"
    if isinstance(name, str):
        return (*path, "name"), f"found {found(name)}{choices(name, METHODS)}"
    return (*path, "name"), f"found {found(name)}; allowed: {', '.join(METHODS)}"


def _missing(annotation: Any, around: type[BaseModel] | None, path: Path) -> str:
    section = _section(annotation)
    if section is None:
        about = around.model_fields[path[-1]].description if around else ""
        return f"missing, and it has no default ({about}); allowed: {describe(annotation)}"
    needed = [name for name, field in section.model_fields.items() if field.is_required()]
    return f"missing section; it needs {', '.join(needed)}"


def _unknown_key(path: Path, around: type[BaseModel]) -> str:
    key, allowed = path[-1], list(around.model_fields)
    if around is Recipe:
        allowed.append(PER_TASK)
    homes = [home for home in _homes(key) if home != ".".join(path[:-1])]
    holders = [name for name, cls in METHODS.items() if key in cls.model_fields]
    if around in METHODS.values() and holders:
        own = around.model_fields["name"].default
        return (
            f"method '{own}' has no such key (it belongs to {', '.join(holders)}); "
            f"allowed: {', '.join(allowed)}"
        )
    if homes and nearest(key, allowed) is None:
        return f"unknown key; it belongs under '{homes[0]}'; allowed here: {', '.join(allowed)}"
    return f"unknown key{choices(key, allowed)}"


def _homes(key: str) -> Iterator[str]:
    """Yield the sections that do have `key`."""
    pending: list[tuple[str, type[BaseModel]]] = [("", Recipe)]
    for prefix, section in pending:
        if key in section.model_fields and prefix:
            yield prefix
        for name, field in section.model_fields.items():
            inner = list(METHODS.values()) if name == "method" else [_section(field.annotation)]
            where = f"{prefix}.{name}" if prefix else name
            pending.extend((where, cls) for cls in inner if cls is not None)


def _options(annotation: Any, words: list[str]) -> list[str]:
    """Return the words a field allows, with null where that is allowed too."""
    plain, _ = _peel(annotation)
    return [*words, "null"] if type(None) in get_args(plain) else words


def _words(annotation: Any) -> Iterator[str]:
    """Yield the literal words a field allows, if it allows nothing else (null aside)."""
    plain, _ = _peel(annotation)
    if get_origin(plain) is Literal:
        yield from (word for word in get_args(plain) if isinstance(word, str))
    elif get_origin(plain) in (Union, types.UnionType):
        arms = [arm for arm in get_args(plain) if arm is not type(None)]
        if all(get_origin(_peel(arm)[0]) is Literal for arm in arms):
            for arm in arms:
                yield from _words(arm)


def _peel(annotation: Any) -> tuple[Any, list[FieldInfo]]:
    """Take `Annotated` off: the plain type and the FieldInfos that bound it, outermost last."""
    fields: list[FieldInfo] = []
    while get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
        fields = [item for item in metadata if isinstance(item, FieldInfo)] + fields
    return annotation, fields


def _item(annotation: Any) -> Any:
    plain, _ = _peel(annotation)
    return get_args(plain)[0]


def _section(annotation: Any) -> type[BaseModel] | None:
    """Return the section class of an annotation, also of `Section | None`."""
    plain, _ = _peel(annotation)
    if isinstance(plain, type) and issubclass(plain, BaseModel):
        return plain
    arms = [arm for arm in get_args(plain) if arm is not type(None)]
    if get_origin(plain) in (Union, types.UnionType) and len(arms) == 1:
        return _section(arms[0])
    return None
