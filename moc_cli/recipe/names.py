"""How columns and parts of a custom dataset are usually named; the sections for other names."""

from typing import Any

from pydantic import Field

from moc_cli.recipe.types import Section, Text

COLUMNS = {
    "text": ("text", "sentence", "sentence1"),
    "text_pair": ("text_pair", "sentence2"),
    "label": ("label", "labels", "score"),
    "instruction": ("instruction", "prompt", "question"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "answer"),
    "messages": ("messages", "conversation", "conversations"),
}
# The names that `datasets` knows, so that a folder means the same here and on the hub.
PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
OPTIONAL = ("text_pair", "input", "validation", "test")


def _usual(key: str) -> Any:
    """Return the field for a name that is one of the usual ones where the recipe gives none."""
    *names, last = (COLUMNS | PARTS)[key]
    note = ", if present" if key in OPTIONAL else ""
    return Field(default=None, description=f"null: {', '.join(names)} or {last}{note}")


class ColumnsSection(Section):
    """Names of the columns of a custom dataset, where they are not the usual ones."""

    text: Text | None = _usual("text")
    text_pair: Text | None = _usual("text_pair")
    label: Text | None = _usual("label")
    instruction: Text | None = _usual("instruction")
    input: Text | None = _usual("input")
    output: Text | None = _usual("output")
    messages: Text | None = _usual("messages")


class SplitsSection(Section):
    """Names of the parts in a dataset of the hub or in a folder, where they are not the usual."""

    train: Text | None = _usual("train")
    validation: Text | None = _usual("validation")
    test: Text | None = _usual("test")
