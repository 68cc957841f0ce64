"""`moc plan`: the recipe's own setting, alternatives to it, and the cheapest that fits the card."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from moc_cli.planning.batches import read_rows
from moc_cli.planning.cards import Card
from moc_cli.planning.fit import fitting_mode
from moc_cli.planning.plans import Plan, Planner, alternatives_to, changes_to, cheapest
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build

PlanProgress = Callable[[int, int], None]  # settings done, settings in all


def plan_variants(
    name: str,
    variants: Sequence[tuple[Recipe, Sequence[str]]],
    card: Card | None,
    observe: PlanProgress,
) -> dict[str, Any]:
    """Return what `moc plan --json` prints for variants of the recipe `name`, its own first.

    A variant is a recipe and the changes that made it. Raises MocError for all that would stop a
    training before its weights are read.
    """
    first, _ = variants[0]
    if first.data.custom:  # its rows say what the model has to be
        data = build.read_rows(first)[0].data
        variants = [(r.model_copy(update={"data": data}), changes) for r, changes in variants]
        first, _ = variants[0]
    rows, unread = read_rows(first, build.base_shape(first))
    planner = Planner(card, rows)
    chosen = [fitting_mode(recipe, planner) for recipe, _ in variants]
    alternatives = [alternatives_to(recipe) for recipe in chosen]
    total = len(chosen) + sum(map(len, alternatives))
    plans: list[Plan] = []
    for recipe, settings, (_, changes) in zip(chosen, alternatives, variants, strict=True):
        for setting in (recipe, *settings):
            plans.append(planner.plan(setting, changes, all_layers=setting is recipe))
            observe(len(plans), total)
    best = plans[0] if plans[0].fits else cheapest(plans[1 : len(alternatives[0]) + 1])
    return {
        "plans": [asdict(plan) for plan in plans],
        "recipe": name,
        "device": None if card is None else asdict(card),
        "choice": None if best is None else changes_to(best, first),
        "unread": unread,
    }
