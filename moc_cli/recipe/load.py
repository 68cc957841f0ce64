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

    @classmethod
    def in_file(cls, name: str, line: int) -> "Position":
        """Return a line of a file; 0 for the file as a whole."""
        return cls((0, line), f"{name}:{line}" if line else name)


@dataclass
class Draft:
    """A recipe before validation: its values, the place of each path, and the mistakes so far.

    `wrong` are the paths whose values are no valid ones by themselves.
    """

    values: dict[str, Any]
    places: dict[reader.Path, Position]
    mistakes: list[tuple[Position, Problem]] = field(default_factory=list)
    wrong: set[reader.Path] = field(default_factory=set)

    def copy(self) -> "Draft":
        return Draft(copy.deepcopy(self.values), dict(self.places), list(self.mistakes))

    def place(self, path: reader.Path) -> Position:
        """Return where `path`, or the nearest section around it, was written."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]

    def is_override(self, path: reader.Path) -> bool:
        return self.place(path).order[0] == 1

    def is_wrong(self, path: reader.Path) -> bool:
        """Whether a path in `wrong` is `path` itself, lies inside it or around it."""
        return any(path[: len(wrong_path)] == wrong_path[: len(path)] for wrong_path in self.wrong)

    def report(self, path: reader.Path, message: str, place: Position | None = None) -> None:
        if path == ("method", "name") and isinstance(self.values.get("method"), str):
            path = ("method",)
        place = place or self.place(path)
        self.mistakes.append((place, Problem(place.text, ".".join(path), message)))

    def error(self) -> RecipeError:
        """Return the error with one line per mistake, in the order of the places."""
        ordered = sorted(self.mistakes, key=lambda mistake: mistake[0].order)
        problems = dict.fromkeys(problem for _, problem in ordered)
        renamed = ("method", "name") in self.places and self.is_override(("method", "name"))
        hint = None
        if renamed and any(problem.key.startswith("method.") for problem in problems):
            hint = "--set method=<name> takes a method with its own defaults."
        return RecipeError.of(problems, hint)


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
    recipe = _check_rules(draft, _validate(draft))
    if draft.mistakes:
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
    """Block style, with lists of plain values on one line, for readers of YAML 1.1 and 1.2."""

    def represent_text(self, text: str) -> yaml.Node:
        """Quote what YAML 1.2 reads as a number or a word, and 1.1, PyYAML's, as a text."""
        style = None if reader.parse_scalar(text) == text else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    def represent_list(self, items: list[Any]) -> yaml.Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_text)


def read_draft(name: str | Path) -> Draft:
    """Return the recipe at a path or of a shipped name, for `finish_recipe` to take any number of
    times. Raises RecipeError where there is nothing to validate.
    """
    path = find_recipe(name)
    file = shown(path)
    value, lines, mistakes = reader.read_file(path, file)
    places = {written: Position.in_file(file, line) for written, line in lines.items()}
    draft = Draft(value, places | {(): Position.in_file(file, 0)})
    for line, written, message in mistakes:
        draft.report(written, message, Position.in_file(file, line))
    if isinstance(value, dict):
        return draft
    if not mistakes:
        kind = "a list" if isinstance(value, list) else f"the text {str(value)[:40]!r}"
        message = f"found {kind}; a recipe is a set of sections: {', '.join(Recipe.model_fields)}"
        if value is None:
            message = "the recipe is empty; moc recipes copy quickstart gives one to start from"
        draft.report((), message, Position.in_file(file, 1))
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
        _set(draft, path, value, place)


def _set(draft: Draft, path: reader.Path, value: Any, place: Position) -> None:
    """Set one value; a section that is not there is made, and takes the place of the value."""
    section = draft.values
    for depth, part in enumerate(path[:-1], start=1):
        inner = section.get(part)
        if path[:depth] == ("method",):
            inner = expand_method(inner)
        if inner is None:
            inner = {}
            draft.places.setdefault(path[:depth], place)
        if not isinstance(inner, dict):
            kind = "a list; set all of it" if isinstance(inner, list) else "a value, not a section"
            draft.report(path, f"'{'.'.join(path[:depth])}' is {kind}", place)
            return
        section[part] = inner
        section = inner
    section[path[-1]] = value
    other_places = {at: old for at, old in draft.places.items() if at[: len(path)] != path}
    draft.places = other_places | {path: place}


def _validate(draft: Draft) -> RecipeFile:
    """Return the recipe; where values are wrong, without them. They are reported."""
    values = draft.values
    method = values.get("method")
    name = method.get("name") if isinstance(method, dict) else None
    if isinstance(name, str) and name not in METHODS and (meant := nearest(name, METHODS)):
        draft.report(("method", "name"), method_name(name))
        values = {**values, "method": {**values["method"], "name": meant}}
    try:
        return RecipeFile.model_validate(values)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            path, message, meant_path = explain(detail)
            draft.report(path, message)
            draft.wrong |= {path, meant_path}
    valid = copy.deepcopy(values)
    for section, *keys in draft.wrong:
        if keys and section != "method" and isinstance(valid.get(section), dict):
            valid[section].pop(keys[0], None)
        else:
            valid.pop(section, None)
    for section, stand_ins in _STAND_INS.items():
        if any(draft.is_wrong((section, key)) for key in stand_ins):
            valid[section] = stand_ins | (valid.get(section) or {})
    return RecipeFile.model_validate(valid)


def _check_rules(draft: Draft, recipe: RecipeFile) -> RecipeFile:
    """Report impossible combinations, also under each entry of `per_task`; return the recipe with
    the entry of its task applied.
    """
    base, resolved, data = list(_broken(draft, recipe)), recipe, recipe.data
    for rule in base:
        draft.report(tuple(rule.key.split(".")), rule.message)
    if recipe.per_task and len(data.tasks) != 1 and not draft.is_wrong(("data", "tasks")):
        draft.report(("per_task",), "settings per task need exactly one task in data.tasks")
    tasks = tuple(TASKS[data.suite]) or tuple(data.tasks)
    for task in recipe.per_task:
        if task not in tasks:
            if not draft.is_wrong(("data", "suite")):
                draft.report(("per_task", task), f"unknown task{choices(task, tasks)}")
            continue
        variant, changed = _with_entry(draft, recipe, task)
        for rule in _broken(draft, variant):
            key = next((key for key in rule.reads if key in changed), None)
            if key is not None and rule not in base:
                draft.report(("per_task", task, *key.split(".")), rule.message)
        if [task] == data.tasks:
            resolved = variant
    return resolved


def _broken(draft: Draft, recipe: RecipeFile) -> Iterator[BrokenRule]:
    """Yield the combinations that cannot work, of values that are not wrong by themselves."""
    for rule in broken_rules(recipe):
        if not any(draft.is_wrong(tuple(key.split("."))) for key in rule.reads):
            yield rule


def _with_entry(draft: Draft, recipe: RecipeFile, task: str) -> tuple[RecipeFile, set[str]]:
    """Return the recipe of one task with its entry of `per_task`, and the keys that this changes.

    The entry goes over the file and under the overrides.
    """
    sections: dict[str, Any] = {"data": recipe.data.model_copy(update={"tasks": [task]})}
    changed = set()
    for name, entry in recipe.per_task[task]:
        section = getattr(recipe, name)
        overridden = {key for key in section.model_fields_set if draft.is_override((name, key))}
        update = {
            key: getattr(entry, key)
            for key in entry.model_fields_set
            if key not in overridden or draft.is_override(("per_task", task, name, key))
        }
        sections[name] = section.model_copy(update=update)
        changed |= {f"{name}.{key}" for key in update}
    return recipe.model_copy(update=sections), changed
