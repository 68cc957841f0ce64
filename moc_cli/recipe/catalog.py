"""The recipes that come with the program, and how a name or a path leads to one."""

import os
from pathlib import Path
from typing import NamedTuple

from moc_cli.errors import RecipeError
from moc_cli.recipe.suggest import choices, did_you_mean, nearest

SWEEPS, RESULTS = "sweeps", "results"  # folders beside the recipes that hold none
_PACKAGE = Path(__file__).resolve().parent.parent


class ShippedRecipe(NamedTuple):
    """A shipped recipe or sweep: the name to call it by, its file, and its first comment."""

    name: str
    path: Path
    summary: str

    @property
    def kind(self) -> str:
        """`recipe` or `sweep`."""
        return "sweep" if self.path.parent.name == SWEEPS else "recipe"


def folder() -> Path:
    """Return the folder of shipped recipes: in an installed wheel, or beside the package."""
    shipped = _PACKAGE / "_recipes"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "recipes"


def entries() -> list[ShippedRecipe]:
    """Return every shipped recipe, ordered by name."""
    root = folder()
    # The kept results hold thousands of files: they are not looked through.
    inner = [path for path in root.glob("*/") if path.name not in (SWEEPS, RESULTS)]
    paths = [*root.glob("*.yaml"), *(path for place in inner for path in place.rglob("*.yaml"))]
    return [
        ShippedRecipe(path.relative_to(root).with_suffix("").as_posix(), path, _summary(path))
        for path in sorted(paths)
    ]


def shipped_sweeps() -> list[ShippedRecipe]:
    """Return every shipped sweep, ordered by name."""
    paths = sorted((folder() / SWEEPS).glob("*.yaml"))
    return [ShippedRecipe(path.stem, path, _summary(path)) for path in paths]


def find_sweep(name: str) -> Path:
    """Return the file that a path or the name of a shipped sweep stands for.

    Raises RecipeError with the nearest name.
    """
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    sweeps = {entry.name: entry.path for entry in shipped_sweeps()}
    plain = _plain(name).removeprefix(f"{SWEEPS}/")
    if plain in sweeps:
        return sweeps[plain]
    is_recipe = plain in {entry.name for entry in entries()}
    raise RecipeError(
        f"{name}: no such file, and no shipped sweep of that name{choices(plain, sweeps)}",
        f"{plain} is a recipe: say what varies, as --vary method.top_k=0,1" if is_recipe else None,
    )


def shipped(name: str) -> ShippedRecipe:
    """Return the shipped recipe or sweep of this name. Raises RecipeError naming the nearest."""
    recipes = {entry.name: entry for entry in [*entries(), *shipped_sweeps()]}
    plain_name = _plain(name).removeprefix(f"{SWEEPS}/")
    if plain_name in recipes:
        return recipes[plain_name]
    guess = did_you_mean(plain_name, recipes)
    raise RecipeError(
        f"no shipped recipe or sweep is called {name!r}{guess}", hint="moc recipes list"
    )


def find_recipe(name: str | Path) -> Path:
    """Return the file that a path or the name of a shipped recipe stands for.

    Raises RecipeError with the nearest file or name.
    """
    path = Path(os.path.expanduser(name))
    if path.exists() and not path.is_dir():
        return path
    recipes, plain_name = {entry.name: entry.path for entry in entries()}, _plain(str(name))
    if plain_name in recipes:
        return recipes[plain_name]
    if path.is_dir():
        inner = sorted(file.name for file in path.iterdir() if file.suffix == ".yaml")
        hint = f"Did you mean {path / inner[0]}?" if inner else "Give the path of a YAML file."
        raise RecipeError(f"{name}: a folder, not a recipe", hint=hint)
    beside = path.parent.iterdir() if path.parent.is_dir() else ()
    near = nearest(path.name, [file.name for file in beside if file.suffix in (".yaml", ".yml")])
    guess = str(path.with_name(near)) if near else nearest(plain_name, recipes)
    raise RecipeError(
        f"{name}: no such file, and no shipped recipe of that name"
        + (f"; did you mean '{guess}'?" if guess else ""),
        hint="moc recipes list shows the recipes that come with the program.",
    )


def _plain(name: str) -> str:
    return name.removesuffix(".yaml").removeprefix("recipes/")


def shown(path: Path) -> str:
    """Return `path` as a user would type it: relative if it lies below the current folder."""
    if not path.is_absolute():
        return str(path)
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _summary(path: Path) -> str:
    with path.open(encoding="utf-8") as lines:
        first = lines.readline().strip()
    return first.removeprefix("#").strip() if first.startswith("#") else ""
