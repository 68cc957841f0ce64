"""What stands above and below every picture: which run, which rows, how many decisions."""

from pathlib import PurePosixPath
from typing import Any

ONE_DECISION = {"sample": "one per row", "token": "one per token", "batch": "one per batch"}


def subtitle(routing: dict[str, Any]) -> str:
    """Return run, model and method, without the folders in which they lie."""
    run = PurePosixPath(str(routing["run"]).replace("\\", "/")).name
    return " · ".join(part for part in (run, model_name(routing), method(routing)) if part)


def model_name(routing: dict[str, Any]) -> str:
    """Return the hub's name, or a local folder's last part."""
    name = str(routing["model"])
    local = name.startswith(("/", ".", "~")) or "\\" in name
    return PurePosixPath(name.replace("\\", "/")).name if local else name


def method(routing: dict[str, Any]) -> str:
    """Return the method in words: what decides how routes come about."""
    section = routing["method"]
    words = [str(section.get("name", "moc"))]
    words += [f"{word} {section[key]}" for key, word in METHOD_WORDS.items() if key in section]
    return ", ".join(words)


METHOD_WORDS = {"rank": "rank", "top_k": "top", "alpha": "alpha"}


def caption(routing: dict[str, Any], *remarks: str, counted: bool = True) -> str:
    """Return the remarks, then rows and decisions: `counted` is false where none were counted."""
    parts = list(remarks)
    if counted:
        parts.append(source(routing))
    if routing.get("step") is not None:
        parts.append(f"Controls of step {routing['step']:,}.")
    return " ".join(parts)


def source(routing: dict[str, Any]) -> str:
    """Return what was routed: the text or tasks, the split, the limit and the decisions."""
    level = ONE_DECISION.get(str(routing.get("level")), str(routing.get("level")))
    decided = f"{routing['decisions']:,} decisions a block ({level})"
    if routing.get("text") is not None:
        return f"{decided} on one text."
    names = list(routing.get("tasks") or {})
    limit = routing.get("limit")
    rows = "all rows" if limit is None else f"at most {limit:,} rows of each task"
    return f"{decided} on {', '.join(names) or 'the rows'}: {routing['split']} split, {rows}."
