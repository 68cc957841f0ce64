"""`moc plan RECIPE`: memory and time of a training before it runs."""

import shlex
from typing import Annotated

import typer

from moc_cli.cli.options import (
    JsonOption,
    RecipeArgument,
    SetOption,
    TrustOption,
    program,
    repeated,
    split_names,
)


def plan(
    recipe: RecipeArgument,
    set_: SetOption = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="CARD",
            help="A size such as 24GB, or a card such as A100-80GB, whose rates give the time too; "
            "default: the GPU of this machine.",
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Methods to plan; default: the recipe's."),
    ] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="Plan each of these values of a recipe key too, as in data.max_length=256,512; "
            "may be repeated for all combinations.",
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", help="Plan for N processes: the same as launch.num_processes."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(metavar="ddp|fsdp2", help="The same as launch.strategy."),
    ] = None,
    trust_remote_code: TrustOption = False,
    json: JsonOption = False,
) -> None:
    """Estimate what a training needs: memory by part, time, and which settings fit a card.

    A step of the training is replayed without weights and without a GPU. Beside the recipe's own
    setting, others are planned: recomputed activations, smaller batches, a base in 4 bits.
    """
    from moc_cli.benchmark.variants import make_variants
    from moc_cli.planning.cards import find_card
    from moc_cli.recipe.load import check_trust

    launch = {"num_processes": processes, "strategy": strategy}
    launch_changes = [f"launch.{key}={value}" for key, value in launch.items() if value is not None]
    set_ = [*(set_ or []), *launch_changes]
    variants = make_variants(recipe, set_, split_names(methods) or None, vary or [])
    check_trust(variants[0].recipe, recipe, granted=trust_remote_code)
    card = None if gpu is None else find_card(gpu)
    # Imported late: a mistake in the recipe is reported sooner.
    from moc_cli.planning.fit import card_here
    from moc_cli.planning.session import plan_variants
    from moc_cli.report.output import print_json, print_table, say
    from moc_cli.report.plan_table import parts_table, plans_table, wire_table
    from moc_cli.report.progress import WorkProgress

    settings = [(variant.recipe, variant.changes) for variant in variants]
    with WorkProgress("settings", 0) as bar:
        results = plan_variants(recipe, settings, card or card_here(), bar.observe)
    if json:
        print_json(results)
        return
    print_table(parts_table(results), plans_table(results), *wire_table(results))
    if results["unread"]:
        say(f"Batches are taken as full: {results['unread']}")
    if results["device"] is None:
        say("No GPU is here and none is named: --gpu 24GB tells what fits.")
    elif results["choice"] is None:
        say("None of these settings fits the card.")
    else:
        changes = [*variants[0].all_changes, *results["choice"]]
        command = [program(), "train", recipe, *repeated("--set", changes)]
        say(f"Fits: {shlex.join(command)}")
