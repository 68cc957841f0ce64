"""The optional section `per_task`: other settings of `train` and `eval` for single tasks.

    per_task:
      rte: {train: {num_train_epochs: 80, learning_rate: 4.0e-4}}

The entry of the one task in `data.tasks` is laid over the recipe, under any `--set`; the resolved
recipe has no such section. Entries of other tasks are checked, not used.
"""

from typing import Any

from moc_cli.recipe.draft import Draft, Origin
from moc_cli.recipe.messages import PER_TASK, found
from moc_cli.recipe.reader import Path
from moc_cli.recipe.suggest import choices
from moc_cli.recipe.tasks import CUSTOM_TASK, TASKS

SECTIONS = ("train", "eval")


def split_per_task(draft: Draft) -> tuple[Draft, dict[str, Draft]]:
    """Take `per_task` out of `draft`; return the rest, and the rest under each task's entry."""
    base = draft.copy()
    base.problems = draft.problems
    entries = base.values.pop(PER_TASK, None)
    if entries is None:
        return base, {}
    if not isinstance(entries, dict):
        message = f"found {found(entries)}; allowed: a section with task names as keys"
        base.report(base.origin((PER_TASK,)), message)
        return base, {}
    known = _known_tasks(base)
    variants = {}
    for task, entry in entries.items():
        if known and task not in known:
            origin = base.origin((PER_TASK, task))
            base.report(origin, f"unknown task{choices(task, known)}")
        elif _well_formed(base, task, entry):
            variants[task] = _overlay(base, task, entry)
    if _selected(base) is None and isinstance(base.values.get("data"), dict):
        message = "settings per task need exactly one task in data.tasks"
        base.report(base.origin((PER_TASK,)), message)
    return base, variants


def choose(base: Draft, variants: dict[str, Draft]) -> Draft:
    """Return the draft that holds for the task of this run."""
    return variants.get(_selected(base) or "", base)


def _known_tasks(draft: Draft) -> tuple[str, ...]:
    data = draft.values.get("data")
    suite = data.get("suite") if isinstance(data, dict) else None
    if suite == "custom":
        return tuple(filter(None, [_selected(draft)]))
    return tuple(TASKS.get(suite, ())) if isinstance(suite, str) else ()


def _selected(draft: Draft) -> str | None:
    data = draft.values.get("data")
    tasks = data.get("tasks") if isinstance(data, dict) else None
    if isinstance(data, dict) and data.get("suite") == "custom" and "tasks" not in data:
        return CUSTOM_TASK
    names = [tasks] if isinstance(tasks, str) else tasks
    if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str):
        return names[0]
    return None


def _well_formed(draft: Draft, task: str, entry: Any) -> bool:
    """Report what is no section with `train` and `eval` sections in it."""
    where: Path = (PER_TASK, task)
    if not isinstance(entry, dict):
        wanted = f"a section with the keys {', '.join(SECTIONS)}"
        draft.report(draft.origin(where), f"found {found(entry)}; allowed: {wanted}")
        return False
    good = True
    for name, values in entry.items():
        origin = draft.origin((*where, name))
        if name not in SECTIONS:
            draft.report(origin, f"unknown key{choices(name, SECTIONS)}")
            good = False
        elif not isinstance(values, dict):
            draft.report(origin, f"found {found(values)}; allowed: a section with keys of {name}")
            good = False
    return good


def _overlay(base: Draft, task: str, entry: dict[str, dict[str, Any]]) -> Draft:
    """Return `base` with the task's values, except where an override speaks."""
    variant = base.copy()
    for name, values in entry.items():
        for key, value in values.items():
            source = (PER_TASK, task, name, key)
            origin, path = base.origin(source), (name, key)
            if _overridden(base, path) and not origin.is_override:
                continue
            section = variant.values.get(name)
            if section is None:
                section = variant.values[name] = {}
            if isinstance(section, dict):
                section[key] = value
                variant.forget(path)
                variant.origins[path] = origin
    return variant


def _overridden(draft: Draft, path: Path) -> bool:
    origin: Origin = draft.origin(path)
    return origin.is_override
