"""`moc plan`: the recipe's own setting, others beside it, and the cheapest that fits the card."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from moc_cli.planning.batches import read_rows
from moc_cli.planning.cards import Card
from moc_cli.planning.fit import fitting_mode
from moc_cli.planning.plans import Plan, Planner, changes_to, cheapest, settings_of
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build

Progress = Callable[[int, int], None]  # settings done, settings in all


def run(
    name: str,
    variants: Sequence[tuple[Recipe, Sequence[str]]],
    card: Card | None,
    observe: Progress,
) -> dict[str, Any]:
    """Return what `moc plan --json` prints for variants of the recipe `name`, its own first.

    A variant is a recipe and the changes that made it. Raises MocError for all that would stop a
    training before its weights are read.
    """
    first, _ = variants[0]
    if first.data.suite == "custom":  # its rows say what the model has to be
        told = build.read_rows(first)[0].data
        variants = [(r.model_copy(update={"data": told}), changes) for r, changes in variants]
        first, _ = variants[0]
    rows, unread = read_rows(first, build.base_shape(first))
    planner = Planner(card, rows)
    total = sum(len(settings_of(recipe)) + 1 for recipe, _ in variants)
    own: list[Plan] = []
    plans: list[Plan] = []
    for recipe, changes in variants:
        chosen = fitting_mode(recipe, planner)
        own.append(planner.plan(chosen, changes, whole=True))
        plans.append(own[-1])
        observe(len(plans), total)
        for setting in settings_of(recipe):
            plan = planner.plan(setting, changes)
            plans.append(plan)
            observe(len(plans), total)
    best = own[0] if own[0].fits else cheapest(plans[1 : len(settings_of(first)) + 1])
    return {
        "plans": [plan.to_json() for plan in _once(plans)],
        "recipe": name,
        "device": None if card is None else asdict(card),
        "choice": None if best is None else changes_to(best, first),
        "unread": unread,
    }


def _once(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans, each setting once: the recipe's own is replayed whole, and comes first."""
    known: dict[tuple[Any, ...], Plan] = {}
    for plan in plans:
        known.setdefault(
            (
                plan.method,
                *plan.changes,
                plan.activation_checkpointing,
                plan.per_device_train_batch_size,
                plan.load_in_4bit,
            ),
            plan,
        )
    return list(known.values())
