"""A sweep: a recipe, and the values in which its runs differ.

recipe: glue/minilm/moc          # a file, or a recipe that comes with the program
set: {eval.before: false}        # in every run
vary:                            # one run for each combination
  data.tasks: [mrpc, rte]        # a key and its values,
  method:                        # or values by name, each a set of keys
    control: {method: control, method.rank: 16}
    moc: {method.rank: 13}
  train.learning_rate: [3.0e-4, 1.0e-3]
seeds: [0, 1, 2]                 # default: the recipe's
choose: train.learning_rate      # tried on the first seeds; the others take the best value
choose_seeds: 1                  # how many seeds each value is tried on
reference: control               # what the other values of its group are compared with
eval: [""]                       # options of a `moc eval` after each training
output_dir: runs/sweeps/glue     # default: runs/sweeps/<name>
results_dir: results/glue        # where the small files of finished runs are copied
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from moc_cli.errors import MocError, Problem, RecipeError
from moc_cli.recipe import reader
from moc_cli.recipe.catalog import find_sweep, shown
from moc_cli.recipe.suggest import choices
from moc_cli.recipe.types import LAST_SEED

KEYS = (
    *("recipe", "set", "vary", "seeds", "choose", "choose_seeds", "reference", "eval"),
    *("output_dir", "results_dir"),
)


@dataclass(frozen=True)
class Setting:
    """One value of a group that varies: its name, and its changes as `--set` takes them."""

    group: str
    name: str
    changes: tuple[str, ...]


@dataclass(frozen=True)
class Sweep:
    """What a sweep trains: every combination of one setting of each of the `groups`.

    The values of `chosen_group` are tried on the first `choose_seeds` seeds. `evaluations` are
    options of `moc eval`, as texts. `seeds` is empty where the recipe's own seed is the only one.
    """

    name: str
    recipe: str
    common: tuple[str, ...] = ()
    groups: Mapping[str, Sequence[Setting]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    chosen_group: str | None = None
    choose_seeds: int = 1
    reference: str | None = None
    evaluations: tuple[str, ...] = ()
    output_dir: str = ""
    results_dir: str | None = None

    @property
    def cells(self) -> list[tuple[Setting, ...]]:
        """All combinations of the groups but the chosen one."""
        groups = [group for name, group in self.groups.items() if name != self.chosen_group]
        return list(product(*groups))

    @property
    def candidates(self) -> Sequence[Setting | None]:
        """What is tried on the first seeds; [None] where nothing is chosen."""
        return [None] if self.chosen_group is None else self.groups[self.chosen_group]

    def settings(self, cell: Sequence[Setting], candidate: Setting | None) -> tuple[Setting, ...]:
        """Return all settings of a run, in the order of the groups."""
        by_group = {setting.group: setting for setting in (*cell, candidate) if setting}
        return tuple(by_group[group] for group in self.groups)

    def row(self, cell: Sequence[Setting]) -> str:
        """Name a cell by its groups but the one whose values stand side by side."""
        return " ".join(setting.name for setting in cell if setting.group != self.compared_group)

    @property
    def compared_group(self) -> str:
        """The group whose values stand side by side: the reference's, or the last one.

        Empty where there is no group but the one that is chosen from.
        """
        names = [name for name in self.groups if name != self.chosen_group]
        for name in names:
            if any(setting.name == self.reference for setting in self.groups[name]):
                return name
        return names[-1] if names else ""


def read_sweep(name: str) -> Sweep:
    """Return the sweep of a file, or one that comes with the program.

    Raises RecipeError with one line per mistake.
    """
    path = find_sweep(name)
    place = shown(path)
    value, lines, mistakes = reader.read_file(path, place)
    if not mistakes:
        sweep, wrong = _parse(path, value)
        for at, message in wrong:
            mistakes.append(reader.Mistake(lines.get(at) or lines.get(at[:1], 1), at, message))
    if mistakes:
        problems = (Problem(f"{place}:{line}", ".".join(at), text) for line, at, text in mistakes)
        raise RecipeError.of(problems)
    return sweep


def setting_of(group: str, value: Any) -> Setting:
    """Return the setting of a key and one of its values, named by the value."""
    text = reader.as_text(value)
    return Setting(group, text, (f"{group}={text}",))


def check_keys(changes: Sequence[str]) -> Iterator[str]:
    """Yield a sentence for each change of a key that a sweep gives to each run itself."""
    for change in dict.fromkeys(change.partition("=")[0].strip() for change in changes):
        if change == "seed":
            yield "seed: a sweep's seeds are given by 'seeds', or --seeds N,M"
        elif change == "output.output_dir":
            yield "output.output_dir: a sweep names each run's folder; --output-dir DIR for all"


def check_choice(key: str, groups: Collection[str]) -> str | None:
    """Return what is wrong with the key whose values are chosen from."""
    return None if key in groups else f"nothing of this name varies{choices(key, groups)}"


def check_choose_seeds(number: Any, choose: str | None, seeds: int) -> str | None:
    """Return what is wrong with the number of seeds that values are tried on, of so many."""
    if choose is None:
        return "nothing is chosen: it belongs to 'choose'"
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number <= seeds:
        allowed = f"a whole number from 1 to {seeds}, the number of seeds"
        return f"found {reader.as_text(number)}; allowed: {allowed}"
    return None


def check_reference(name: str, names: Sequence[str]) -> str | None:
    """Return what is wrong with a reference, where it is not one of the values that vary."""
    if not names:
        return "nothing is compared: 'choose' takes all that varies"
    if name not in names:
        return f"not one of the compared values{choices(name, names)}"
    return "several values have this name" if names.count(name) > 1 else None


def parse_vary(text: str) -> tuple[str, list[Any]]:
    """Return the key and the values of `KEY=VALUE,VALUE`; MocError where it is something else."""
    key, equals, values = text.partition("=")
    document = reader.read_yaml(f"[{values}]")
    if not equals or not key.strip() or document.mistakes or not document.value:
        raise MocError(
            f"--vary {text}: expected KEY=VALUE,VALUE",
            "for example --vary method.top_k=1,3,7",
        )
    return key.strip(), document.value


Mistakes = Iterator[tuple[reader.Path, str]]


def _parse(path: Path, value: Any) -> tuple[Sweep, list[tuple[reader.Path, str]]]:
    """Return the sweep, and what is wrong with it; it is only good where nothing is."""
    empty = Sweep(path.stem, "")
    if not isinstance(value, dict):
        return empty, [((), f"a sweep is a set of keys: {', '.join(KEYS)}")]
    mistakes = list(_check(value))
    if mistakes:
        return empty, mistakes
    groups = {group: list(_settings(group, values)) for group, values in value["vary"].items()}
    return Sweep(
        name=path.stem,
        recipe=value["recipe"],
        common=tuple(
            f"{key}={reader.as_text(setting)}" for key, setting in (value.get("set") or {}).items()
        ),
        groups=groups,
        seeds=tuple(value.get("seeds") or ()),
        chosen_group=value.get("choose"),
        choose_seeds=value.get("choose_seeds") or 1,
        reference=value.get("reference"),
        evaluations=tuple(value.get("eval") or ()),
        output_dir=value.get("output_dir") or f"runs/sweeps/{path.stem}",
        results_dir=value.get("results_dir"),
    ), []


def _settings(group: str, values: list[Any] | dict[str, Any]) -> Iterator[Setting]:
    if isinstance(values, list):
        yield from (setting_of(group, value) for value in values)
        return
    for name, changes in values.items():
        texts = tuple(f"{key}={reader.as_text(value)}" for key, value in (changes or {}).items())
        yield Setting(group, name, texts)


def _check(value: dict[str, Any]) -> Mistakes:
    for key in value:
        if key not in KEYS:
            yield (key,), f"unknown key{choices(key, KEYS)}"
    if not isinstance(value.get("recipe"), str):
        yield ("recipe",), "missing; allowed: a recipe file, or the name of a shipped recipe"
    if not isinstance(value.get("set") or {}, dict):
        yield ("set",), "allowed: keys of the recipe with a value each"
    yield from _check_vary(value.get("vary"))
    seeds = value.get("seeds") or []
    if not isinstance(seeds, list) or not all(_is_seed(seed) for seed in seeds):
        yield ("seeds",), f"allowed: a list of whole numbers from 0 to {LAST_SEED}"
    elif len(set(seeds)) < len(seeds):
        yield ("seeds",), "each seed once"
    groups = value["vary"] if isinstance(value.get("vary"), dict) else {}
    choose = value.get("choose")
    if choose is not None and (message := check_choice(str(choose), groups)):
        yield ("choose",), message
    if value.get("choose_seeds") is not None:
        count = max(1, len(seeds)) if isinstance(seeds, list) else 1
        if message := check_choose_seeds(value["choose_seeds"], choose, count):
            yield ("choose_seeds",), message
    if value.get("reference") is not None:
        compared = [values for key, values in groups.items() if values and key != choose]
        names = [name for values in compared for name in _names(values)]
        if message := check_reference(str(value["reference"]), names):
            yield ("reference",), message
    evaluations = value.get("eval") or []
    if not isinstance(evaluations, list) or not all(isinstance(e, str) for e in evaluations):
        yield ("eval",), 'allowed: a list of options of moc eval, as ["--limit 200"]; [""] for none'
    for key in ("output_dir", "results_dir"):
        if not isinstance(value.get(key) or "", str):
            yield (key,), "allowed: a folder"


def _check_vary(vary: Any) -> Mistakes:
    if not isinstance(vary, dict) or not vary:
        yield ("vary",), "missing; allowed: keys of the recipe with a list of values each"
        return
    for group, values in vary.items():
        path = ("vary", group)
        if not isinstance(values, list | dict) or not values:
            yield path, "allowed: a list of values, or names with a set of keys each"
        elif isinstance(values, dict):
            for name, changes in values.items():
                if not isinstance(changes or {}, dict):
                    yield (*path, name), "allowed: keys of the recipe with a value each"
        names = _names(values) if isinstance(values, list | dict) else []
        if len(set(names)) < len(names):
            yield path, "each value once"


def _names(values: list[Any] | dict[str, Any]) -> list[str]:
    return [reader.as_text(value) for value in values] if isinstance(values, list) else list(values)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LAST_SEED
