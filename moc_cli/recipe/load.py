"""Read a recipe file, apply `--set` and `per_task`, and report every mistake at once."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from moc_cli.errors import Problem, RecipeError
from moc_cli.recipe import reader
from moc_cli.recipe.catalog import find_recipe, shown
from moc_cli.recipe.messages import explain, method_name
from moc_cli.recipe.methods import METHODS, expand_method
from moc_cli.recipe.rules import BrokenRule, broken_rules
from moc_cli.recipe.schema import Recipe, RecipeFile
from moc_cli.recipe.sections import Sections
from moc_cli.recipe.suggest import choices, nearest
from moc_cli.recipe.tasks import TASKS

# What stands in for a required key that is missing or wrong while rules about other keys are
# checked.
_STAND_INS: dict[str, dict[str, Any]] = {
    "model": {"model_name_or_path": "?"},
    "data": {"suite": "builtin", "tasks": ["world"]},
    "output": {"output_dir": "?"},
}


class Position(NamedTuple):
    """Where a value was written. `order` sorts places: (0, line) in the file, (1, n) for the n-th
    override.
    """

    order: tuple[int, int]
    text: str


@dataclass
class Draft:
    """A recipe before validation: its values, the place of each path, and the mistakes so far."""

    values: dict[str, Any]
    places: dict[reader.Path, Position]
    problems: list[tuple[Position, Problem]] = field(default_factory=list)

    def copy(self) -> "Draft":
        return Draft(copy.deepcopy(self.values), dict(self.places), list(self.problems))

    def place(self, path: reader.Path) -> Position:
        """Return where `path`, or the nearest section around it, was written."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def is_override(self, path: reader.Path) -> bool:
        return self.place(path).order[0] == 1

    def report(self, path: reader.Path, message: str, place: Position | None = None) -> None:
        if path == ("method", "name") and isinstance(self.values.get("method"), str):
            path = ("method",)
        place = place or self.place(path)
        self.problems.append((place, Problem(place.text, ".".join(path), message)))

    def error(self) -> RecipeError:
        """Return the error with one line per mistake, in the order of the places."""
        ordered = sorted(self.problems, key=lambda item: item[0].order)
        problems = tuple(dict.fromkeys(problem for _, problem in ordered))
        renamed = ("method", "name") in self.places and self.is_override(("method", "name"))
        hint = None
        if renamed and any(problem.key.startswith("method.") for problem in problems):
            hint = "--set method=<name> takes a method with its own defaults."
        return RecipeError("\n".join(map(str, problems)), hint, problems)


def load_recipe(
    name: str | Path, overrides: Sequence[str] = (), varied: Sequence[str] = ()
) -> Recipe:
    """Return the recipe at a path or of a shipped name, with `key=value` overrides applied.

    Mistakes name the option that gave an override: --set, or --vary for those of `varied`.

    Raises RecipeError with one line per mistake, in the order of the file, then of the overrides.
    """
    return finish_recipe(read_draft(name), overrides, varied)


def finish_recipe(
    draft: Draft, overrides: Sequence[str] = (), varied: Sequence[str] = ()
) -> Recipe:
    """Return the recipe of a draft with overrides applied, as `load_recipe`; the draft is kept."""
    draft = draft.copy()
    _apply(draft, [*(("--set", o) for o in overrides), *(("--vary", v) for v in varied)])
    recipe, wrong = _validate(draft)
    if recipe is not None:
        recipe = _check_rules(draft, recipe, wrong)
    if draft.problems:
        raise draft.error()
    return Recipe.model_construct(**{key: getattr(recipe, key) for key in Recipe.model_fields})


def check_trust(recipe: Recipe, file: str | Path, *, granted: bool) -> None:
    """Raise RecipeError where a recipe wants the model's own code and this call did not allow it.

    A recipe may come from a stranger, alone or in a run folder, so it cannot allow it itself.
    """
    if recipe.model.trust_remote_code and not granted:
        raise RecipeError(
            f"{file}: model.trust_remote_code: true; Python code from the folder of "
            f"'{recipe.model.model_name_or_path}' would run, and a recipe alone cannot allow that",
            "if you trust this code, add --trust-remote-code",
        )


def dump(recipe: Recipe) -> str:
    """Return `recipe` as YAML that reads back to an equal one, by any YAML reader."""
    values = recipe.model_dump(mode="json")
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Block style, with lists of plain values on one line."""

    def represent_list(self, items: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)


def read_draft(name: str | Path) -> Draft:
    """Return the recipe at a path or of a shipped name, for `finish_recipe` to take any number of
    times. Raises RecipeError where there is nothing to validate.
    """
    path = find_recipe(name)
    name = shown(path)
    draft = Draft({}, {(): Position((0, 0), name)})
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{name}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = Problem(f"{name}:{line}", "", "not UTF-8 text; save the recipe as UTF-8")
        raise RecipeError(str(problem), problems=(problem,)) from error
    document = reader.read_yaml(text)
    for written, line in document.lines.items():
        draft.places[written] = (
            Position((0, line), f"{name}:{line}") if written else draft.places[()]
        )
    for line, written, message in document.mistakes:
        place = Position((0, line), f"{name}:{line}" if line else name)
        draft.report(written, message, place)
    if isinstance(document.value, dict):
        draft.values = document.value
        return draft
    value = document.value
    kind = "a list" if isinstance(value, list) else f"the text {str(value)[:40]!r}"
    message = f"found {kind}; a recipe is a set of sections: {', '.join(Recipe.model_fields)}"
    if value is None:
        message = "the recipe is empty; moc recipes copy quickstart gives one to start from"
    if not document.mistakes:
        draft.report((), message, Position((0, 1), f"{name}:1"))
    raise draft.error()


def _apply(draft: Draft, overrides: Sequence[tuple[str, str]]) -> None:
    """Apply `key=value` texts, each with its option: sections first, otherwise in their order."""
    changes = []
    for index, (option, text) in enumerate(overrides):
        place = Position((1, index), f"{option} {text if len(text) <= 80 else f'{text[:77]}...'}")
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            message = "expected key=value, for example --set train.learning_rate=1.0e-4"
            draft.report((), message, place)
            continue
        document = reader.read_yaml(value)
        for mistake in document.mistakes:
            draft.report((), mistake.message, place)
        if not document.mistakes:
            changes.append((path, document.value, place))
    for path, value, place in sorted(changes, key=lambda change: len(change[0])):
        section = draft.values
        for depth, part in enumerate(path[:-1], start=1):
            inner = section.get(part)
            if path[:depth] == ("method",):
                inner = expand_method(inner)
            if inner is None:
                inner = {}
                draft.places.setdefault(path[:depth], place)
            if not isinstance(inner, dict):
                is_list = isinstance(inner, list)
                kind = "a list; set all of it" if is_list else "a value, not a section"
                draft.report(path, f"'{'.'.join(path[:depth])}' is {kind}", place)
                break
            section[part] = inner
            section = inner
        else:
            section[path[-1]] = value
            for below in [place for place in draft.places if place[: len(path)] == path]:
                del draft.places[below]
            draft.places[path] = place


def _validate(draft: Draft) -> tuple[RecipeFile | None, set[reader.Path]]:
    """Return the recipe, and the paths that are wrong; where some are, without their values.

    None where not even the rest can be validated.
    """
    values = draft.values
    wrong: set[reader.Path] = set()
    method = values.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    if isinstance(name, str) and name not in METHODS and (meant := nearest(name, METHODS)):
        draft.report(("method", "name"), method_name(name))
        values = {**values, "method": {**values["method"], "name": meant}}
    try:
        return RecipeFile.model_validate(values), wrong
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path, message, meant_path = explain(detail)
            draft.report(path, message)
            wrong |= {path, meant_path}
    valid = copy.deepcopy(values)
    for section, *keys in wrong:
        if keys and section != "method" and isinstance(valid.get(section), dict):
            valid[section].pop(keys[0], None)
        else:
            valid.pop(section, None)
    for section, stand_ins in _STAND_INS.items():
        needed = {key: value for key, value in stand_ins.items() if _touches((section, key), wrong)}
        if needed:
            valid[section] = needed | (valid.get(section) or {})
    try:
        return RecipeFile.model_validate(valid), wrong
    except ValidationError:
        return None, wrong


def _check_rules(draft: Draft, recipe: RecipeFile, wrong: set[reader.Path]) -> RecipeFile:
    """Report impossible combinations, also under each entry of `per_task`; return the recipe with
    the entry of its task applied.

    An entry goes over the file and under the overrides. Keys in `wrong` have been reported.
    """

    def broken(sections: Sections) -> Iterator[BrokenRule]:
        for rule in broken_rules(sections):
            if not any(_touches(tuple(key.split(".")), wrong) for key in rule.reads):
                yield rule

    base, resolved = list(broken(recipe)), recipe
    for rule in base:
        draft.report(tuple(rule.key.split(".")), rule.message)
    data = recipe.data
    if recipe.per_task and len(data.tasks) != 1 and not _touches(("data", "tasks"), wrong):
        draft.report(("per_task",), "settings per task need exactly one task in data.tasks")
    tasks = tuple(TASKS[data.suite]) or tuple(data.tasks)
    for task, settings in recipe.per_task.items():
        if task not in tasks:
            if not _touches(("data", "suite"), wrong):
                draft.report(("per_task", task), f"unknown task{choices(task, tasks)}")
            continue
        changes: dict[str, Any] = {"data": data.model_copy(update={"tasks": [task]})}
        changed = set()
        for name, section in (("train", settings.train), ("eval", settings.eval)):
            around = getattr(recipe, name)
            overridden = {k for k in around.model_fields_set if draft.is_override((name, k))}
            update = {
                key: getattr(section, key)
                for key in section.model_fields_set
                if key not in overridden or draft.is_override(("per_task", task, name, key))
            }
            changes[name] = around.model_copy(update=update)
            changed |= {f"{name}.{key}" for key in update}
        variant = recipe.model_copy(update=changes)
        for rule in broken(variant):
            key = next((key for key in rule.reads if key in changed), None)
            if key is not None and rule not in base:
                draft.report(("per_task", task, *key.split(".")), rule.message)
        if [task] == data.tasks:
            resolved = variant
    return resolved


def _touches(path: reader.Path, wrong: set[reader.Path]) -> bool:
    """Whether a path in `wrong` is `path` itself, lies inside it or around it."""
    return any(path[: len(other)] == other[: len(path)] for other in wrong)
