"""Whether a run fits the GPU that it is to train on, asked before its weights load."""

from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase

from moc_cli.errors import MocError
from moc_cli.planning.batches import Rows
from moc_cli.planning.cards import Card, card_of
from moc_cli.planning.plans import CONTEXT, MODES, Planner, alternatives_to, changes_to, cheapest
from moc_cli.recipe.schema import Recipe
from moc_cli.report.lines import labelled
from moc_cli.report.numbers import byte_size
from moc_cli.scoring.batch_size import free_bytes
from moc_cli.training.build import TrainingRows


def card_here() -> Card | None:
    """Return the GPU of this machine; None where there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return card_of(properties.name, properties.total_memory)


def fitting_mode(recipe: Recipe, planner: Planner) -> Recipe:
    """Return the recipe with `auto` replaced by the fastest way that fits, or the smallest."""
    if recipe.train.activation_checkpointing != "auto":
        return recipe
    for mode in MODES:
        recipe = recipe.changed(train={"activation_checkpointing": mode})
        if planner.card is None or planner.plan(recipe, all_layers=True).fits:
            break
    return recipe


class Forecast:
    """Plans a training on its GPU; a run that does not fit is refused unless `force` is given.

    On the CPU nothing is planned: its memory is that of the whole process.
    """

    def __init__(self, say: Callable[[str], None], *, force: bool) -> None:
        self._say, self._force = say, force

    def __call__(
        self,
        recipe: Recipe,
        rows: TrainingRows,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> tuple[Recipe, int | None]:
        """Return the recipe with `auto` replaced, and the bytes that torch will allocate at most.

        Raises MocError where the run needs more than is free on the GPU.
        """
        if device.type != "cuda":
            if recipe.train.activation_checkpointing != "auto":
                return recipe, None
            self._say(labelled("plan", "activation_checkpointing: auto is none on the CPU"))
            return recipe.changed(train={"activation_checkpointing": "none"}), None
        free = free_bytes(device)
        planned_rows = Rows.of(rows, tokenizer, recipe.data.max_length)
        planner = Planner(Card("free", free + CONTEXT), planned_rows)
        chosen = fitting_mode(recipe, planner)
        plan = planner.plan(chosen, all_layers=True)
        mode = plan.activation_checkpointing
        self._say(
            labelled(
                "plan",
                f"{byte_size(plan.step_bytes)} of {byte_size(free)} free, "
                f"activation checkpointing {mode}",
            )
        )
        if not plan.fits and not self._force:
            raise MocError(
                f"the training needs {byte_size(plan.peak_bytes - CONTEXT)} on the GPU, of which "
                f"{byte_size(free)} are free",
                self._way_out(recipe, chosen, planner),
            )
        return chosen, plan.step_bytes

    def _way_out(self, recipe: Recipe, chosen: Recipe, planner: Planner) -> str:
        best = cheapest([planner.plan(setting) for setting in alternatives_to(chosen)])
        anyway = "--force trains all the same"
        if best is None:
            return f"take a shorter data.max_length or a smaller model; {anyway}"
        changes = " ".join(f"--set {change}" for change in changes_to(best, recipe))
        return f"it fits with {changes}; {anyway}"
