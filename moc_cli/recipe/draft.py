"""A recipe before it is validated: raw values, and for each path the place that set it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moc_cli.errors import Problem
from moc_cli.recipe.methods import expand_method
from moc_cli.recipe.reader import Path, read_yaml

EXAMPLE = "for example --set train.learning_rate=1.0e-4"


@dataclass(frozen=True)
class Origin:
    """Where a value was written: text for the reader, key as written there, order of reports."""

    place: str
    key: str
    order: tuple[int, int]

    @property
    def is_override(self) -> bool:
        return self.order[0] > 0


@dataclass
class Draft:
    """Raw values with their origins, and what was wrong before validation."""

    values: dict[str, Any]
    origins: dict[Path, Origin]
    problems: list[tuple[Origin, Problem]] = field(default_factory=list)
    unread: set[Path] = field(default_factory=set)

    def copy(self) -> "Draft":
        """Return the same draft, to be changed, without its problems."""
        return Draft(copy.deepcopy(self.values), dict(self.origins), unread=self.unread)

    def origin(self, path: Path) -> Origin:
        """Return where `path`, or the nearest section around it, was written."""
        here = path
        while here not in self.origins:
            here = here[:-1]
        known = self.origins[here]
        tail = path[len(here) :]
        if not tail or (path == ("method", "name") and isinstance(self.values["method"], str)):
            return known
        return Origin(known.place, ".".join((*filter(None, [known.key]), *tail)), known.order)

    def report(self, origin: Origin, message: str) -> None:
        self.problems.append((origin, Problem(origin.place, origin.key, message)))

    def forget(self, path: Path) -> None:
        """Drop the origins of everything below `path`."""
        for known in [one for one in self.origins if len(one) > len(path)]:
            if known[: len(path)] == path:
                del self.origins[known]


def apply_overrides(draft: Draft, overrides: Sequence[str]) -> None:
    """Apply `key=value` texts: sections before their keys, otherwise in the order given."""
    parsed = []
    for index, text in enumerate(overrides):
        shown = text if len(text) <= 80 else f"{text[:77]}..."
        origin = Origin(f"--set {shown}", "", (1, index))
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            draft.report(origin, f"expected key=value, {EXAMPLE}")
            continue
        read = read_yaml(value)
        for mistake in read.mistakes:
            draft.report(origin, mistake.message)
        if not read.mistakes:
            parsed.append((path, read.value, Origin(origin.place, key.strip(), origin.order)))
    for path, new, origin in sorted(parsed, key=lambda item: len(item[0])):
        _set(draft, path, new, origin)


def _set(draft: Draft, path: Path, value: Any, origin: Origin) -> None:
    current = draft.values
    for depth, part in enumerate(path[:-1], start=1):
        inner = current.get(part)
        if path[:depth] == ("method",):
            inner = current[part] = expand_method(inner)
        if inner is None:
            inner = current[part] = {}
            draft.origins[path[:depth]] = Origin(origin.place, ".".join(path[:depth]), origin.order)
        if not isinstance(inner, dict):
            held = "a list; set all of it" if isinstance(inner, list) else "a value, not a section"
            draft.report(origin, f"'{'.'.join(path[:depth])}' is {held}")
            return
        current = inner
    current[path[-1]] = value
    draft.forget(path)
    draft.origins[path] = origin
