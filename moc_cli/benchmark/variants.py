"""What a benchmark compares: methods, and values of recipe keys that are tried one after another.

No torch here: a mistake is reported before it is imported.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from moc_cli.errors import MocError
from moc_cli.recipe.load import finish_recipe, read_draft
from moc_cli.recipe.methods import METHODS
from moc_cli.recipe.reader import as_text
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import choices
from moc_cli.recipe.sweep import parse_vary

BASE = "base"
# Keys that are the same for everything that is compared, beside the sections launch and output.
COMMON = ("method", "method.name", "model.trust_remote_code", "data.suite", "data.tasks")
# Methods that mean the same by keys of the same name: a recipe's own values go over to these.
_KIN = ({"moc", "control"}, {"lora", "dora", "molex"})


@dataclass(frozen=True)
class Variant:
    """A recipe with one method and one set of tried values.

    `changes` are texts such as `method.top_k=3`; those outside of `method` are `shared` with the
    variants that it is compared with. `bare`: the base model without the method. `all_changes` are
    those that make this recipe of the named one, as `--set` takes them.
    """

    recipe: Recipe
    changes: tuple[str, ...] = ()
    bare: bool = False
    all_changes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """The method's name, or `base`."""
        return BASE if self.bare else self.recipe.method.name

    @property
    def name(self) -> str:
        """The method, and what is tried with it."""
        return " ".join([self.method, *self.changes])

    @property
    def shared(self) -> tuple[str, ...]:
        """The tried values that are not of the method."""
        return tuple(change for change in self.changes if not _is_of_method(change))


def make_variants(
    recipe: str, changes: Sequence[str], methods: Sequence[str] | None, vary: Sequence[str]
) -> list[Variant]:
    """Return each method with each combination of the values tried, methods in their order.

    `changes` are those of `--set`. Without `methods` it is the recipe's own. A method's keys are
    tried with the methods that have them. A method other than the recipe's has its own defaults;
    keys that it shares with a related method (`control` with `moc`) have the recipe's values.
    Raises MocError for an unknown method, a wrong key, and what is given twice.
    """
    for name in methods or ():
        if name not in METHODS:
            raise MocError(f"--methods: '{name}' is no method{choices(name, list(METHODS))}")
    if methods is not None and not methods:
        raise MocError("--methods names no method", f"known: {', '.join(METHODS)}")
    draft = read_draft(recipe)
    own_recipe = finish_recipe(draft, changes)
    methods = methods or [own_recipe.method.name]
    tried = [_values(text) for text in vary]
    _refuse_repeated("--methods", methods)
    _refuse_repeated("--vary", [key for key, _ in tried])
    for _, texts in tried:
        _refuse_repeated("--vary", texts)
    unused = [key for key, _ in tried if not any(_has(name, key) for name in methods)]
    if unused:
        raise MocError(
            f"--vary: none of the methods {', '.join(methods)} has the key {unused[0]}",
            "moc recipes schema lists the keys of each method",
        )
    variants = []
    for name in methods:
        fitting = [texts for key, texts in tried if _has(name, key)]
        for combination in product(*fitting):
            chosen = _of_method(own_recipe, name, changes)
            is_own = chosen == list(changes) and not combination
            changed = own_recipe if is_own else finish_recipe(draft, chosen, combination)
            variants.append(Variant(changed, combination, all_changes=(*chosen, *combination)))
    return variants


def _refuse_repeated(option: str, names: Sequence[str]) -> None:
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise MocError(f"{option}: {', '.join(repeated)} is given more than once")


def with_bases(variants: Sequence[Variant]) -> list[Variant]:
    """Return the variants, and before those that share tried values the bare base with them."""
    bases = {v.shared: Variant(v.recipe, v.shared, bare=True) for v in reversed(variants)}
    result = []
    for variant in variants:
        if variant.shared in bases:
            result.append(bases.pop(variant.shared))
        result.append(variant)
    return result


def _of_method(recipe: Recipe, name: str, changes: Sequence[str]) -> list[str]:
    """Return the changes with which a recipe has another method."""
    if name == recipe.method.name:
        return list(changes)
    section: dict[str, Any] = {"name": name}
    if any({name, recipe.method.name} <= kin for kin in _KIN):
        written = recipe.method.model_dump(mode="json", exclude_unset=True)
        fields = METHODS[name].model_fields
        section = {key: value for key, value in written.items() if key in fields} | section
    other_changes = [change for change in changes if not _is_of_method(change)]
    return [*other_changes, f"method={name if len(section) == 1 else json.dumps(section)}"]


def _is_of_method(change: str) -> bool:
    return change.partition("=")[0].strip().partition(".")[0] == "method"


def _has(method: str, key: str) -> bool:
    """Whether a recipe of this method can have the key; keys elsewhere are the same for all."""
    section, *path = key.split(".")
    if section != "method":
        return True
    values: Any = METHODS[method]().model_dump()
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _values(text: str) -> tuple[str, list[str]]:
    """Return the key of a `KEY=VALUE,VALUE`, and a change of the recipe for each value."""
    key, values = parse_vary(text)
    if key in COMMON or key.startswith(("launch.", "output.")):
        raise MocError(
            f"--vary {key}: this is the same for everything that is compared",
            "give it once, with --set; methods are named by --methods",
        )
    return key, [f"{key}={as_text(value)}" for value in values]
