"""Which routes matter: the loss of the same rows with one site's routed controls made local.

At that site α·g_t + (1−α)·Σ π_k·g_k becomes (α + (1−α)·Σ π_k)·g_t, everywhere else all stays; the
sites after it decide again on what reaches them.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from moc_cli.data.examples import Example
from moc_cli.load_run import LoadedRun
from moc_cli.nn.mixture import Mixture
from moc_cli.nn.site import Site
from moc_cli.nn.vote import Route
from moc_cli.scoring.batch_size import BatchSizeOption
from moc_cli.scoring.forward import Progress
from moc_cli.scoring.results import ScoringOptions


@contextmanager
def local_at(mixture: Mixture, index: int) -> Iterator[None]:
    """Within it one site runs its own control in place of the routed controls."""

    def reroute(site: Site, route: Route) -> Route:
        if site.index != index:
            return route
        return Route(torch.full_like(route.ids, site.local), route.weights)

    previous, mixture.reroute = mixture.reroute, reroute
    try:
        yield
    finally:
        mixture.reroute = previous


def ablate(
    trained: LoadedRun,
    examples: Sequence[Example],
    *,
    batch_size: BatchSizeOption,
    on_progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Return the mean change of a row's loss for each site, with its standard error over the rows.

    A row's loss is the mean over the tokens of its answer, or its classification loss, in nats
    (a regression: squared error). The same rows are compared, so that the error is of differences.
    """
    mixture = trained.adapted.mixture
    assert mixture is not None
    original_losses = row_losses(trained, examples, batch_size)
    entries: list[dict[str, Any]] = []
    for site in mixture.sites:
        with local_at(mixture, site.index):
            losses = row_losses(trained, examples, batch_size)
        changes = [new - old for new, old in zip(losses, original_losses, strict=True)]
        several = len(changes) > 1
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if several else None
        mean = statistics.fmean(changes)
        entries.append({"site": site.name, "loss_change": mean, "stderr": error})
        if on_progress is not None:
            on_progress(len(entries), len(mixture.sites))
    return entries


def row_losses(
    trained: LoadedRun, examples: Sequence[Example], batch_size: BatchSizeOption
) -> list[float]:
    """Return the loss of each row, without those whose answer was cut off."""
    options = ScoringOptions(batch_size, trained.recipe.data.max_length)
    return trained.kind.row_losses(trained, examples, options)
