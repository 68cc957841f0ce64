"""Votes of several processes as one: `routing.sync`.

The micro-batches that the processes work on at the same time are then one batch: its decision, its
balance loss and the gradients of both.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from moc_cli.nn.vote import Ballot
from moc_cli.processes import Processes


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


class VotesOfProcesses:
    """Joins the votes of processes that are in the same forward; see `JointVotes`."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    @property
    def world(self) -> int:
        """How many processes vote."""
        return self._processes.world

    def join(self, ballot: Ballot, picks: Tensor | None) -> tuple[Ballot, Tensor | None]:
        """The ballot (V = 1) of all, and the shares (N,) of their tokens' own picks; joint.

        A process whose tokens do not vote, with a count of 0, adds nothing.
        """
        own_count, size = ballot.count[0], ballot.mean.shape[1]
        parts = [ballot.mean[0] * own_count, own_count]
        parts += [] if picks is None else [picks * own_count]
        parts += [] if ballot.scores is None else [ballot.scores[0]]
        sizes = [part.numel() for part in parts]
        total: Tensor = _Sum.apply(torch.cat(parts), self._processes)  # type: ignore[no-untyped-call]
        means, count, *rest = total.split(sizes)
        real = count.detach().clamp(min=1)
        rest = [part.detach() for part in rest]
        shares = None if picks is None else rest.pop(0) / real
        scores = None if ballot.scores is None else rest.pop(0).view(1, size)
        mean, count = (means / real).view(1, size), count.detach().view(1, 1)
        return Ballot(mean, count, scores, ballot.vote, ballot.excluded), shares
