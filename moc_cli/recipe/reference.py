"""The keys of a recipe file, for editors (a JSON schema) and for the documentation (a table)."""

import json
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from moc_cli.recipe.messages import allowed_values, section_of
from moc_cli.recipe.methods import METHODS
from moc_cli.recipe.schema import RecipeFile


class Key(NamedTuple):
    """One row of the reference.

    `key` is dotted; in a method's section, "method.rank". `method` is the method that has the key
    ("" for keys outside that section). `default` is as written in YAML, "" for a required key.
    """

    key: str
    method: str
    type: str
    default: str
    allowed: str
    description: str


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, short forms included."""
    schema = RecipeFile.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def keys() -> Iterator[Key]:
    """Yield a row for every key of a recipe file, section after section."""
    yield from _keys(RecipeFile, (), "")


def _keys(section: type[BaseModel], path: tuple[str, ...], method: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        key_path, annotation = (*path, name), field.rebuild_annotation()
        inner = section_of(annotation)
        sections = METHODS if key_path == ("method",) else {method: inner} if inner else {}
        if not sections or not field.is_required() and field.default is None:
            default = (
                ""
                if field.is_required()
                else json.dumps(field.get_default(call_default_factory=True))
            )
            text = (default, allowed_values(annotation), field.description or "")
            yield Key(".".join(key_path), method, _type(annotation), *text)
        for method_name, cls in sections.items():
            yield from _keys(cls, key_path, method_name)


def _type(annotation: Any) -> str:
    """Return the type of a value as YAML calls it, for example "integer or null"."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin in (list, dict):
        return {list: "list", dict: "section"}[origin]
    if origin is Literal:
        return _type(type(arguments[0]))
    if arguments:
        return " or ".join(map(_type, arguments))
    names = {int: "integer", float: "number", bool: "boolean", str: "text", types.NoneType: "null"}
    return names.get(annotation, "section")
