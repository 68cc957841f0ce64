"""What watchers see of the decisions in one forward; nothing here is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moc_cli.nn.vote import VOTES, Ballot, Level, Route, Voters, decide, poll


@dataclass(slots=True)
class Decision:
    """V decisions among N controls, and how they were made; its tensors may carry a graph.

    `is_new` (V,) marks the decisions that count: not those of padding alone, of a beam's copy, or
    taken before; None: all count. `probabilities` (B, T, N) are the tokens' own and `valid` (B, T)
    marks who voted (None: all); without probabilities only the outcome is known.
    """

    level: Level
    route: Route
    ballot: Ballot
    is_new: Tensor | None
    probabilities: Tensor | None = None
    valid: Tensor | None = None


class Watcher(Protocol):
    """Sees each decision once, never the recomputed ones of a backward pass.

    `added` sees a block's own output (B, T, d) and what the site adds to it.
    """

    def decided(self, site: Any, decision: Decision) -> None: ...
    def added(self, site: Any, output: Tensor, update: Tensor) -> None: ...


def new_decisions(
    shape: Sequence[int],
    valid: Tensor | None,
    deciding: Tensor | None,
    level: Level,
    copies: int,
) -> Tensor | None:
    """Mark the decisions (V,) of a forward over (B, T) tokens that count; None: all of them.

    A batch always decides; a row without a voter decides nothing yet. Where the rows are `copies`
    of each of the user's, as beams are, the first of each counts. `deciding` (B,): only these rows
    decide.
    """
    if level == "batch" or (valid is None and deciding is None and copies == 1):
        return None
    device = next(mark.device for mark in (valid, deciding, torch.empty(0)) if mark is not None)
    tokens = torch.ones(*shape, dtype=torch.bool, device=device) if valid is None else valid
    if deciding is not None:
        tokens = tokens & deciding[:, None]
    if copies > 1:
        first = torch.arange(shape[0], device=device) % copies == 0
        tokens = tokens & first[:, None]
    return tokens.flatten() if level == "token" else tokens.any(dim=1)


def one_token_decides(decision: Decision) -> Tensor | None:
    """Mark the decisions (V,) that a single voter turns: without it others would be chosen.

    A row with one voter is decided by it. None where each token decides for itself anyway. With a
    vote whose scores do not add up, the vote is taken again without each token in turn.
    """
    p, ballot, k = decision.probabilities, decision.ballot, decision.route.ids.shape[1]
    if p is None or decision.level == "token":
        return None
    valid = decision.valid
    mark = torch.ones_like(p[..., 0]) if valid is None else valid.to(p.dtype)
    if decision.level == "batch":
        p, mark = p.flatten(0, 1)[None], mark.flatten()[None]
    voters, tokens = mark.shape
    if VOTES[ballot.vote].additive:
        single = _poll(p.flatten(0, 1)[:, None], mark.flatten()[:, None], k, ballot)
        rest = ballot.rows(lambda values: values.repeat_interleave(tokens, dim=0)) - single
        without = decide(rest, k, "renormalized").ids.view(voters, tokens, k)
    else:
        masks = [mark.index_fill(1, torch.tensor([s], device=p.device), 0) for s in range(tokens)]
        ballots = [_poll(p, voting, k, ballot) for voting in masks]
        without = torch.stack(
            [decide(remaining, k, "renormalized").ids for remaining in ballots], dim=1
        )
    chosen = decision.route.ids.sort(dim=-1).values
    turned: Tensor = without.sort(dim=-1).values != chosen[:, None]  # (V, S, K)
    return turned.flatten(1).any(dim=1) | (ballot.count[:, 0] <= 1)


def _poll(p: Tensor, mark: Tensor, k: int, like: Ballot) -> Ballot:
    """The ballot of the marked tokens (V, S) of p (V, S, N), under the rules of another."""
    voters = Voters.of(mark.shape, mark, "sample", p.device, p.dtype)
    return poll(p, voters, k, like.vote, like.excluded)
