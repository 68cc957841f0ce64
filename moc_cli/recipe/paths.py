"""Local paths in a recipe, made independent of the folder that one stands in."""

import os
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
# Words that are no paths, and keys whose paths are files: a folder may have any name.
WORDS = {"data.template": ("alpaca", "chat", "plain"), "data.chat_template": ("chatml",)}


def absolute_paths(recipe: Recipe) -> Recipe:
    """Return the recipe with every path that exists here as an absolute one; links are kept."""
    for dotted in PATH_KEYS:
        name, _, key = dotted.partition(".")
        path = absolute_value(dotted, getattr(getattr(recipe, name), key))
        recipe = recipe.changed(**{name: {key: path}})
    return recipe


def absolute_value(key: str, value: Any) -> Any:
    """Return the value of one of `PATH_KEYS`: a path that exists here as an absolute one."""
    words = WORDS.get(key, ())
    if value in words or (words and not os.path.isfile(os.path.expanduser(str(value)))):
        return value
    return absolute_path(value)


def absolute_path(value: Any) -> Any:
    """Return a path that exists here as an absolute one, and anything else as it is.

    The text of a template is none, however long it is.
    """
    if not isinstance(value, str):
        return value
    path = os.path.expanduser(value)
    return os.path.abspath(path) if os.path.exists(path) else value
