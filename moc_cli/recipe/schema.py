"""The recipe, and the file that it is read from."""

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from moc_cli.recipe.rules import broken_rules
from moc_cli.recipe.sections import EvalSection, Sections, TrainSection
from moc_cli.recipe.types import Section, section


class Recipe(Sections):
    """Everything a run needs, with no impossible combination in it."""

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        broken = "; ".join(map(str, broken_rules(self)))
        if broken:
            raise PydanticCustomError("combination", "{broken}", {"broken": broken})
        return self

    def changed(self, **sections: dict[str, Any]) -> Self:
        """Return the recipe with other values in these sections; they are not checked."""
        changes = {
            name: getattr(self, name).model_copy(update=values) for name, values in sections.items()
        }
        return self.model_copy(update=changes)


class TaskSettings(Section):
    """Other values of `train` and `eval` for one task."""

    train: TrainSection = section("values of the section train")
    eval: EvalSection = section("values of the section eval")


class RecipeFile(Sections):
    """A recipe file: the sections of a recipe, and values that hold for single tasks only.

    The entry of the one task in `data.tasks` goes over the other sections, and under `--set`.
    """

    per_task: Annotated[
        dict[str, TaskSettings], BeforeValidator(lambda value: {} if value is None else value)
    ] = Field(default={}, description="values of train and eval for single tasks, by task name")
