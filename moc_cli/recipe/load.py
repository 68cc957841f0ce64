"""Read a recipe file, apply `--set` overrides, validate, and report every mistake at once."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moc_cli.errors import Problem, RecipeError
from moc_cli.recipe.catalog import find_recipe, shown
from moc_cli.recipe.check import check
from moc_cli.recipe.draft import Draft, Origin, apply_overrides
from moc_cli.recipe.messages import PER_TASK
from moc_cli.recipe.per_task import choose, split_per_task
from moc_cli.recipe.reader import read_yaml
from moc_cli.recipe.schema import Recipe

_METHOD_HINT = "--set method=<name> takes a method with its own defaults."


def load_recipe(name: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe at a path or under a shipped name, with `key=value` overrides applied.

    Raises RecipeError with one line per mistake, in the order of the file, then of the overrides.
    """
    path = find_recipe(name)
    draft = _read(path)
    apply_overrides(draft, overrides)
    base, variants = split_per_task(draft)
    recipe = _check(base)
    for variant in variants.values():
        own = _check(variant)
        base.problems += [one for one in variant.problems if one[1].key.startswith(PER_TASK)]
        if variant is choose(base, variants):
            recipe = own
    if base.problems or recipe is None:
        raise _error(base)
    return recipe


def dump(recipe: Recipe) -> str:
    """Return `recipe` as YAML that reads back to an equal one, by any YAML reader."""
    text: str = yaml.dump(
        recipe.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )
    return text


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, with the short forms an editor should accept."""
    schema = Recipe.model_json_schema()
    properties, defs = schema["properties"], schema["$defs"]
    methods = [one["properties"]["name"]["const"] for one in _method_schemas(schema)]
    full = {key: properties["method"].pop(key) for key in ("oneOf", "discriminator")}
    properties["method"]["anyOf"] = [{"enum": methods}, full]
    words = defs["DataSection"]["properties"]["tasks"]
    array = {key: words.pop(key) for key in ("type", "items", "minItems")}
    words["anyOf"] = [{"type": "string"}, array]
    entry = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "train": {"$ref": "#/$defs/TrainSection"},
            "eval": {"$ref": "#/$defs/EvalSection"},
        },
    }
    properties[PER_TASK] = {
        "type": "object",
        "description": "other settings of train and eval for single tasks",
        "additionalProperties": entry,
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Block style, with lists of plain values on one line."""


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _represent_list)


def _read(path: Path) -> Draft:
    """Return the file as a draft; raises RecipeError where there is nothing to validate."""
    name = shown(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = Problem(f"{name}:{line}", "", "not UTF-8 text; save the recipe as UTF-8")
        raise RecipeError(str(problem), problems=(problem,)) from error
    read = read_yaml(text)
    draft = Draft({}, {(): Origin(name, "", (0, 0))})
    for mistake in read.mistakes:
        place = f"{name}:{mistake.line}" if mistake.line else name
        draft.report(Origin(place, mistake.key, (0, mistake.line or 0)), mistake.message)
    if not isinstance(read.value, dict):
        if not read.mistakes:
            draft.report(Origin(f"{name}:1", "", (0, 1)), _no_mapping(read.value))
        raise _error(draft)
    draft.values, draft.unread = read.value, read.unread
    for key, line in read.lines.items():
        if key:
            draft.origins[key] = Origin(f"{name}:{line}", ".".join(key), (0, line))
    return draft


def _no_mapping(value: Any) -> str:
    if value is None:
        return "the recipe is empty; moc recipes copy quickstart gives one to start from"
    kind = "a list" if isinstance(value, list) else f"the text {str(value)[:40]!r}"
    return f"found {kind}; a recipe is a set of sections: {', '.join(Recipe.model_fields)}"


def _check(draft: Draft) -> Recipe | None:
    """Validate a draft; problems are added to it."""
    recipe, findings = check(draft.values)
    for finding in findings:
        if finding.path not in draft.unread:
            draft.report(draft.origin(finding.path), finding.message)
    return recipe


def _error(draft: Draft) -> RecipeError:
    ordered = sorted(draft.problems, key=lambda item: item[0].order)
    problems = tuple(dict.fromkeys(problem for _, problem in ordered))
    named = draft.origins.get(("method", "name"))
    mixed = any(problem.key.startswith("method.") for problem in problems)
    hint = _METHOD_HINT if mixed and named is not None and named.is_override else None
    return RecipeError("\n".join(str(problem) for problem in problems), hint, problems)


def _method_schemas(schema: dict[str, Any]) -> list[dict[str, Any]]:
    refs = [one["$ref"] for one in schema["properties"]["method"]["oneOf"]]
    return [schema["$defs"][ref.rsplit("/", 1)[-1]] for ref in refs]
