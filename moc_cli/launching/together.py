"""Whether several processes run a command, and who starts them."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from moc_cli.launching.child import started_by_moc
from moc_cli.launching.place import find_place, is_half_started, lone_launcher, stray_variable
from moc_cli.launching.plan import KEY, SET, make_plan
from moc_cli.recipe.launch import LaunchSection
from moc_cli.report.lines import labelled
from moc_cli.report.output import say

if TYPE_CHECKING:
    from moc_cli.launching.start import ChildProgress


def run_together(
    launch: LaunchSection,
    command: Sequence[str],
    *,
    key: str = SET,
    rows: Sequence[int] = (),
    progress: "ChildProgress" = lambda: ("", None),
) -> int | None:
    """Start the processes of `moc COMMAND` and return their exit code; None for this one alone.

    None also where this is one of several already: it joins them, and their number is the
    launcher's. `key` chooses it on the command line; the product of `rows` is the number of rows
    of a process in a step. `progress` says how far the processes came, where one of them is killed.
    """
    place = find_place(os.environ)
    if place is not None:
        from moc_cli.training.accelerator import join_launched

        if not started_by_moc():
            say(_number_line(place.world, place.launcher, rows))
            _say_ignored(launch, place.world, place.launcher, key)
        join_launched(launch)
        return None
    launcher = lone_launcher(os.environ)
    if launcher is not None:
        stray = stray_variable(os.environ)
        if stray is not None:
            say(f"{stray} is set, and WORLD_SIZE is not: this runs as a single process")
        if is_half_started(os.environ):
            say(
                "accelerate launch --cpu starts only one process; moc starts several itself: "
                f"moc {command[0]} ... {key}N"
            )
        _say_ignored(launch, 1, launcher, key)
        return None
    plan = make_plan(launch, key)
    if plan.processes == 1:
        return None
    why = key.strip(" =") if plan.why == KEY else plan.why
    say(f"{_number_line(plan.processes, why, rows)}; only one: {key}1")
    from moc_cli.launching.start import start

    return start(plan, command, seconds=launch.ddp_timeout, progress=progress)


def count_processes(launch: LaunchSection) -> int:
    """Return how many processes `run_together` would start or join; nothing is started.

    Raises MocError where it would.
    """
    place = find_place(os.environ)
    if place is not None:
        return place.world
    return 1 if lone_launcher(os.environ) is not None else make_plan(launch).processes


def _number_line(processes: int, reason: str, rows: Sequence[int]) -> str:
    text = f"{processes} processes ({reason})"
    if rows:
        total = processes
        for factor in rows:
            total *= factor
        text += f", {total} rows a step ({' x '.join(map(str, (processes, *rows)))})"
    return labelled("launch", text)


def _say_ignored(launch: LaunchSection, processes: int, launcher: str, key: str) -> None:
    planned = launch.num_processes
    if planned not in ("auto", processes):
        word = "process" if processes == 1 else "processes"
        say(f"not used: {key}{planned}; the launcher has started {processes} {word} ({launcher})")
