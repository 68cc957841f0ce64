"""What stands above and below every figure: which run, which rows, how many decisions."""

from pathlib import PurePosixPath
from typing import Any

from moc_cli.recipe.methods import METHODS

LEVELS = {"sample": "one per row", "token": "one per token", "batch": "one per batch"}


def run_name(path: object) -> str:
    """Return a run folder's name; with its parent where it is named as a method, as glue/x/moc.

    A checkpoint's name stands after its run's.
    """
    parts = PurePosixPath(str(path).replace("\\", "/")).parts
    if parts[-2:-1] == ("checkpoints",):
        return f"{run_name('/'.join(parts[:-2]))}, {parts[-1]}"
    return "/".join(parts[-2:] if parts and parts[-1] in METHODS else parts[-1:])


def subtitle(routing: dict[str, Any]) -> str:
    """Return run, model and method, without the folders in which they lie."""
    model = str(routing["model"])
    if model.startswith(("/", ".", "~")) or "\\" in model:  # a local folder, not a name of the hub
        model = PurePosixPath(model.replace("\\", "/")).name
    section = routing["method"]
    names = {"rank": "rank", "top_k": "top", "alpha": "alpha"}
    method = [str(section.get("name", "moc"))]
    method += [f"{word} {section[key]}" for key, word in names.items() if key in section]
    parts = (run_name(routing["run"]), model, ", ".join(method))
    return " · ".join(part for part in parts if part)


def source(routing: dict[str, Any]) -> str:
    """Return what was routed: the text or tasks, the split, the limit and the decisions."""
    level = LEVELS.get(str(routing["level"]), str(routing["level"]))
    decisions = f"{routing['decisions']:,} decisions a site ({level})"
    if routing.get("text") is not None:
        return f"{decisions} on one text."
    tasks = ", ".join(routing.get("tasks") or {}) or "the rows"
    limit = routing.get("limit")
    rows = "all rows" if limit is None else f"at most {limit:,} rows of each task"
    return f"{decisions} on {tasks}: {routing['split']} split, {rows}."


def caption(routing: dict[str, Any], *notes: str, counted: bool = True) -> str:
    """Return the notes, then rows and decisions: `counted` is false where none were counted."""
    parts = [*notes, *([source(routing)] if counted else [])]
    if routing.get("step") is not None:
        parts.append(f"Controls of step {routing['step']:,}.")
    return " ".join(parts)
