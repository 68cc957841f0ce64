"""Votes of several processes as one: `routing.sync`.

The micro-batches that the processes work on at the same time are then one batch: its decision, its
balance loss and the gradients of both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from moc_cli.nn.routing import Routing
from moc_cli.nn.vote import Ballot
from moc_cli.processes import Processes, current


class _Sum(Function):
    """The sum of a tensor over the processes. Each gets the gradients that all have for it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        total = values.clone()
        processes.sum(total)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        ctx.processes.sum(total)
        return total, None


def voting_together(routing: Routing, training: bool) -> Processes | None:
    """The processes that decide together; None where each decides alone."""
    processes = current()
    return processes if routing.sync and training and processes.world > 1 else None


def join_votes(
    ballot: Ballot, picks: Tensor | None, processes: Processes
) -> tuple[Ballot, Tensor | None]:
    """The ballot (V = 1) of all processes, and the shares (N,) of their tokens' own picks; joint.

    A process whose tokens do not vote, with a count of 0, adds nothing.
    """
    size = ballot.mean.shape[1]
    own = ballot.count[0]
    parts = [ballot.mean[0] * own, own]
    parts += [] if picks is None else [picks * own]
    parts += [] if ballot.scores is None else [ballot.scores[0]]
    sizes = [part.numel() for part in parts]
    total: Tensor = _Sum.apply(torch.cat(parts), processes)  # type: ignore[no-untyped-call]
    means, count, *rest = total.split(sizes)
    real = count.detach().clamp(min=1)
    rest = [part.detach() for part in rest]
    shares = None if picks is None else rest.pop(0) / real
    scores = None if ballot.scores is None else rest.pop(0).view(1, size)
    return Ballot(
        (means / real).view(1, size), count.detach().view(1, 1), scores, ballot.vote
    ), shares
