"""Whether a run fits the GPU that it is to train on, asked before its weights load."""

from moc_cli.planning.plans import MODES, Planner
from moc_cli.recipe.schema import Recipe


def fitting_mode(recipe: Recipe, planner: Planner) -> Recipe:
    """Return the recipe with `auto` replaced by the fastest way that fits, or the smallest."""
    if recipe.train.activation_checkpointing != "auto":
        return recipe
    for mode in MODES:
        train = recipe.train.model_copy(update={"activation_checkpointing": mode})
        recipe = recipe.model_copy(update={"train": train})
        if planner.card is None or planner.plan(recipe, whole=True).fits:
            break
    return recipe
