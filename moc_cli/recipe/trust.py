"""Who may let the code of a model's folder run: the one who types the command, and nobody else."""

from pathlib import Path

from moc_cli.errors import RecipeError
from moc_cli.recipe.schema import Recipe


def check_trust(recipe: Recipe, file: str | Path, *, granted: bool) -> None:
    """Raise RecipeError where a recipe wants the model's own code and this call did not allow it.

    A recipe may come from a stranger, alone or in a run folder, so it cannot allow it itself.
    """
    if recipe.model.trust_remote_code and not granted:
        raise RecipeError(
            f"{file}: model.trust_remote_code: true; Python code from the folder of "
            f"'{recipe.model.model_name_or_path}' would run, and a recipe alone cannot allow that",
            "if you trust this code, add --trust-remote-code",
        )
