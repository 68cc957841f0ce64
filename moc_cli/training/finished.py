"""Whether a run folder holds the finished run of a recipe."""

from moc_cli.errors import RunError
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.paths import absolute_paths
from moc_cli.recipe.schema import Recipe
from moc_cli.runs import RunFolder
from moc_cli.training.resume import changed_in_use, check_recipe

LENGTH = {"train.max_steps", "train.num_train_epochs"}


def is_finished(recipe: Recipe, folder: RunFolder) -> bool:
    """Whether the run is done as the recipe has it; a longer one is to be continued.

    Raises RunError where the folder holds a run of another recipe.
    """
    if not (folder.path / "results.json").is_file():
        return False
    results = folder.read_results()
    if results.get("status") != "finished" or results.get("unscored"):
        return False
    saved = load_recipe(folder.recipe_file).model_dump(mode="json")
    wanted = absolute_paths(recipe).model_dump(mode="json")
    for key, value in wanted["data"].items():
        if value is None:  # read from the rows of a custom dataset
            wanted["data"][key] = saved["data"][key]
    check_recipe(saved, wanted)
    changed = changed_in_use(saved, wanted)
    if changed - LENGTH:
        raise RunError(
            f"{folder.path} is finished with another {', '.join(sorted(changed - LENGTH))}",
            "take the values of then, or another folder: --output-dir OTHER",
        )
    return not changed
