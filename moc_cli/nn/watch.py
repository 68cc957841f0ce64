"""What a site has decided in one forward, as those see it who watch; nothing here is trained."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moc_cli.nn.gate import Ballot, Level, Route, Vote, decide, own_picks


@dataclass(slots=True)
class Decision:
    """V decisions among N controls, and how they came about; its tensors may carry a graph.

    `ballot` holds what the voters said. `counted` (V,) marks the decisions that are new and whose
    row is the user's own: not padding alone, not a beam's copy, not a repetition; None: all are.
    `probabilities` (B, T, N) are the tokens' own and `valid` (B, T) marks who voted (None: all);
    without them only the outcome is known.
    """

    level: Level
    route: Route
    ballot: Ballot
    counted: Tensor | None
    probabilities: Tensor | None = None
    valid: Tensor | None = None


class Watcher(Protocol):
    """Sees each decision once, never the recomputed ones of a backward pass.

    `measures`: it also has `added(site, output, update)`, and sees there what a block put out
    (B, T, d) and what the site adds to it.
    """

    measures: bool

    def decided(self, site: Any, decision: Decision) -> None: ...


def newly_decided(
    shape: tuple[int, int], valid: Tensor | None, late: Tensor | None, level: Level, copies: int
) -> Tensor | None:
    """Mark the decisions (V,) of a forward over (B, T) tokens that count; None: all of them.

    A batch always decides; a row without a voter decides nothing yet. Where the rows are `copies`
    of each of the user's, as beams are, the first of each counts. `late` (B,): only these decide.
    """
    if level == "batch" or (valid is None and late is None and copies == 1):
        return None
    device = next(mark.device for mark in (valid, late, torch.empty(0)) if mark is not None)
    tokens = torch.ones(shape, dtype=torch.bool, device=device) if valid is None else valid
    if late is not None:
        tokens = tokens & late[:, None]
    if copies > 1:
        own = torch.arange(shape[0], device=device) % copies == 0
        tokens = tokens & own[:, None]
    return tokens.flatten() if level == "token" else tokens.any(dim=1)


def one_token_decides(decision: Decision, k: int, vote: Vote) -> Tensor | None:
    """Mark the decisions (V,) that a single voter turns: without it others would be chosen.

    A row with one voter is decided by it. None where each token decides for itself anyway.
    """
    p, ballot = decision.probabilities, decision.ballot
    if p is None or decision.level == "token":
        return None
    valid = decision.valid
    weight = p.new_ones(p.shape[:2]) if valid is None else valid.to(p.dtype)
    if decision.level == "batch":
        p, weight = p.flatten(0, 1)[None], weight.flatten()[None]
    weight = weight[..., None]  # (V, S, 1)
    picks = own_picks(p, k) * weight if vote == "mode" else torch.zeros_like(p)
    rest = Ballot(
        (ballot.sums[:, None] - p * weight).flatten(0, 1),
        (ballot.counts[:, None] - picks).flatten(0, 1),
        (ballot.voters[:, None] - weight).flatten(0, 1),
    )
    without = decide(rest, k, vote, "renormalized").ids.sort(dim=-1).values
    chosen = decision.route.ids.sort(dim=-1).values
    turned = without.unflatten(0, p.shape[:2]) != chosen[:, None]  # (V, S, K)
    return turned.flatten(1).any(dim=1) | (ballot.voters[:, 0] <= 1)
