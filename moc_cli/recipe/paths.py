"""Local paths in a recipe, made independent of the folder that one stands in."""

import os
from pathlib import Path
from typing import Any

from moc_cli.recipe.schema import Recipe

# Keys that hold a local path, or the name of something on the hub.
PATH_KEYS = (
    "model.model_name_or_path",
    "model.tokenizer_name",
    "data.path",
    "data.train",
    "data.validation",
    "data.test",
    "data.chat_template",
    "data.template",
)


def absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with every path that exists here as an absolute one; links are kept."""
    for name, _, key in (dotted.partition(".") for dotted in PATH_KEYS):
        path = absolute_path(getattr(getattr(recipe, name), key))
        recipe = recipe.changed(**{name: {key: path}})
    return recipe


def absolute_path(value: Any) -> Any:
    """Return a path that exists here as an absolute one, and anything else as it is."""
    if not isinstance(value, str):
        return value
    path = Path(os.path.expanduser(value))
    return os.path.abspath(path) if path.exists() else value
