"""The vote that turns token probabilities into a route, and the balance loss.

Shapes: B rows, T tokens, N controls in the pool, K routed controls, V decisions (1 for a batch, B
for rows, B·T for tokens), S tokens that vote on one decision.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, Self

import torch
from torch import Tensor

Level = Literal["batch", "sample", "token"]
Estimator = Literal["renormalized", "straight_through", "probability"]


@dataclass
class Route:
    """Which controls were chosen and with what weight: `ids` and `weights` are (V, K)."""

    ids: Tensor
    weights: Tensor
    _picks: list[list[int]] | None = field(default=None, repr=False)
    _groups: list[tuple[int, Tensor]] | None = field(default=None, repr=False)

    @property
    def voters(self) -> int:
        return self.ids.shape[0]

    def picks(self) -> list[list[int]]:
        """The ids on the host; read from the device once."""
        if self._picks is None:
            self._picks = self.ids.tolist()
        return self._picks

    def groups(self) -> list[tuple[int, Tensor]]:
        """(control, its voters (V_k,)) of the controls in use."""
        if self._groups is None:
            used = sorted({k for row in self.picks() for k in row})
            self._groups = [(k, (self.ids == k).nonzero()[:, 0]) for k in used]
        return self._groups

    def rows(self, change: Callable[[Tensor], Tensor]) -> "Route":
        """The route with its rows reordered, selected or repeated by `change`."""
        return Route(change(self.ids), change(self.weights))

    def replaced(self, rows: Tensor, other: "Route") -> "Route":
        """The route with that of `other` in the marked rows (V,)."""
        mark = rows[:, None]
        return Route(
            torch.where(mark, other.ids, self.ids), torch.where(mark, other.weights, self.weights)
        )

    def detach(self) -> "Route":
        return Route(self.ids, self.weights.detach(), self._picks, self._groups)


def top_k(scores: Tensor, k: int) -> Tensor:
    """The indices of the k largest along the last axis; equal scores: the lower index first."""
    if k == 1:
        return scores.argmax(dim=-1, keepdim=True)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def ranked(p: Tensor, excluded: int | None) -> Tensor:
    """What controls are ranked by, (..., N): their probabilities, without a graph.

    The `excluded` one stands below all others: where the softmax underflows, they have 0 too.
    """
    p = p.detach()
    if excluded is None:
        return p
    return p.masked_fill(torch.arange(p.shape[-1], device=p.device) == excluded, -1.0)


@dataclass(frozen=True)
class Vote:
    """How the tokens of a decision rank the controls of the pool.

    `score(p, weight, k)` gives each control a score (V, N), from the probabilities p (V, S, N) and
    the weights (V, S), 1 where a token votes and 0 elsewhere. Equal scores: the larger mean
    probability first, then the lower index. Without `score` the mean probability alone decides.
    `additive`: the scores of two groups of tokens add up to the score of both, as `decode: running`
    needs it.
    """

    score: Callable[[Tensor, Tensor, int], Tensor] | None = None
    additive: bool = True


def _count_picks(p: Tensor, weight: Tensor, k: int) -> Tensor:
    """How many tokens have a control among their own k most probable."""
    picks = torch.zeros_like(p).scatter_(-1, top_k(p, k), 1.0)
    return (picks * weight[..., None]).sum(dim=1)


VOTES: dict[str, Vote] = {"mean": Vote(), "mode": Vote(_count_picks)}


@dataclass
class Ballot:
    """What the tokens of each decision say under one of VOTES.

    `mean` (V, N) are their mean probabilities P̄, `count` (V, 1) is the number of tokens, `scores`
    (V, N) what the vote ranks by, None where that is the mean probability. `excluded` is a control
    that cannot be chosen.
    """

    mean: Tensor
    count: Tensor
    scores: Tensor | None
    vote: str
    excluded: int | None = None

    def __add__(self, other: "Ballot") -> "Ballot":
        """The ballot of both groups of tokens; ValueError where scores do not add up."""
        return self._joined(other, 1)

    def __sub__(self, other: "Ballot") -> "Ballot":
        """The ballot without the tokens of `other`; ValueError where scores do not add up."""
        return self._joined(other, -1)

    def _joined(self, other: "Ballot", sign: int) -> "Ballot":
        if not VOTES[self.vote].additive:
            raise ValueError(
                f"vote '{self.vote}': the scores of two groups of tokens do not add up"
            )
        scores = None
        if self.scores is not None and other.scores is not None:
            scores = self.scores + sign * other.scores
        sums = self.mean * self.count + sign * other.mean * other.count
        count = self.count + sign * other.count
        return Ballot(sums / count.clamp(min=1), count, scores, self.vote, self.excluded)

    def rows(self, change: Callable[[Tensor], Tensor]) -> "Ballot":
        """The ballot with its rows reordered, selected or repeated by `change`."""
        scores = None if self.scores is None else change(self.scores)
        return Ballot(change(self.mean), change(self.count), scores, self.vote, self.excluded)


@dataclass
class Voters:
    """The tokens that vote in one forward: the same for all its sites.

    `marks` (V, S) are 1 where a token votes on a decision and 0 elsewhere, `count` (V, 1) their sum
    and `shares` (V, S) marks over count. `of_all` (B·T,) is 1/n for each of n real tokens,
    `portions` (V, 1) its sum over the tokens of a decision.
    """

    level: Level
    marks: Tensor
    count: Tensor
    shares: Tensor
    of_all: Tensor
    portions: Tensor

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        valid: Tensor | None,
        level: Level,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Those of B rows of T tokens, of which `valid` (B, T) marks the real ones (None: all).

        At level `token` every token decides for itself, padding too (its output is never read).
        """
        if valid is None:
            tokens = torch.ones(*shape, device=device, dtype=dtype)
        else:
            tokens = valid.to(device, dtype)
        marks = tokens
        if level == "batch":
            marks = tokens.flatten()[None]
        elif level == "token":
            marks = torch.ones_like(tokens).view(-1, 1)
        count = marks.sum(dim=1, keepdim=True)
        of_all = tokens.flatten() / tokens.sum().clamp(min=1)
        portions = of_all.view(len(marks), -1).sum(dim=1, keepdim=True)
        return cls(level, marks, count, marks / count.clamp(min=1), of_all, portions)

    def mean(self, p: Tensor) -> Tensor:
        """The mean probabilities P̄ (V, N) of p (B, T, N)."""
        if len(self.shares) == 1:  # one kernel, and in float32 whatever train.tf32 says
            return torch.mv(p.flatten(0, 1).t(), self.shares.flatten().to(p.dtype))[None]
        groups = p.reshape(*self.shares.shape, -1)
        return (groups * self.shares[..., None]).sum(dim=1)

    def deciding(self) -> Tensor | None:
        """Mark the decisions (V,) that have a real token; None for a single one."""
        return None if len(self.portions) == 1 else self.portions[:, 0] > 0

    def balance(self, means: Tensor, share: Tensor, size: int) -> "BalanceLoss":
        """The balance loss of a site with these means (V, N) and shares (N,) of the picks."""
        return BalanceLoss(means, share[None] if len(means) == 1 else self.portions * share, size)

    def picks(self, p: Tensor, k: int, excluded: int | None = None) -> Tensor:
        """The share (N,) of the tokens' own picks, their k most probable, that went to each."""
        picks = top_k(ranked(p, excluded), k).flatten()
        weight = self.of_all if k == 1 else (self.of_all / k).repeat_interleave(k)
        return p.new_zeros(p.shape[-1]).index_add(0, picks, weight)


def poll(p: Tensor, voters: Voters, k: int, vote: str, excluded: int | None = None) -> Ballot:
    """Collect the votes of p (B, T, N), of which one control may be `excluded`.

    Raises ValueError for a vote that is not in VOTES.
    """
    if vote not in VOTES:
        raise ValueError(f"vote '{vote}' is not known; allowed: {', '.join(VOTES)}")
    score, scores = VOTES[vote].score, None
    if score is not None:
        ranks = ranked(p, excluded)
        scores = score(ranks.reshape(*voters.marks.shape, -1), voters.marks, k)
    return Ballot(voters.mean(p), voters.count, scores, vote, excluded)


class JointVotes(Protocol):
    """What makes the votes of `world` processes one."""

    @property
    def world(self) -> int: ...
    def join(self, ballot: Ballot, picks: Tensor | None) -> tuple[Ballot, Tensor | None]:
        """The ballot of all, and the shares (N,) of their tokens' own picks, given those of one."""


def decide(ballot: Ballot, k: int, estimator: Estimator) -> Route:
    """The route (V, K) that the ballot gives, with weights π (eq. 10 where there is one voter).

    The K controls that the vote ranks first. π_k = P̄_k / Σ_S P̄ (`renormalized`), the same with
    the gradient of P̄ (`straight_through`), or P̄_k itself (`probability`).
    """
    mean, ranks = ballot.mean, ranked(ballot.mean, ballot.excluded)
    ids = top_k(ranks, k)
    if ballot.scores is not None:
        by_mean = ranks.sort(dim=-1, descending=True, stable=True).indices
        ids = by_mean.gather(-1, top_k(ballot.scores.gather(-1, by_mean), k))
    if estimator == "renormalized" and k == 1:
        # Exactly 1, without a gradient: c/c would leave rounding noise in the gate's gradient, and
        # Adam scales noise up to full steps.
        return Route(ids, mean.new_ones(()).expand(ids.shape))
    chosen = mean.gather(-1, ids)
    if estimator == "probability":
        weights = chosen
    else:
        # A control without any probability can be chosen by its score alone: never 0/0.
        weights = chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny)
        if estimator == "straight_through":
            weights = weights.detach() + chosen - chosen.detach()
    return Route(ids, weights)


@dataclass(frozen=True)
class BalanceLoss:
    """The balance loss of one site, N · Σ_j f_j·P_j; balanced use gives 1.

    P_j are the mean probabilities over all real tokens, f_j the shares of the picks that went to
    each control, without gradient. `size` is N, or N − 1 where the local control is excluded.
    `means` (V, N) are those of the decisions, `slope` (V, N) is f_j times the share of the tokens
    that a decision has. The gradient needs no more than these: the value is computed where somebody
    reads it.
    """

    means: Tensor
    slope: Tensor
    size: int

    def value(self) -> Tensor:
        """The loss."""
        return self.size * (self.slope * self.means).sum()

    def detach(self) -> "BalanceLoss":
        return BalanceLoss(self.means.detach(), self.slope, self.size)


def shares_of(route: Route, size: int, dtype: torch.dtype, counted: Tensor | None = None) -> Tensor:
    """The share of a route's choices that went to each of `size` controls, as in MoLEx's code.

    `counted` (V,) marks the decisions that count; None: all.
    """
    ids = route.ids.flatten()
    if counted is None:
        shares = torch.full_like(ids, 1 / len(ids), dtype=dtype)
    else:
        k, marks = route.ids.shape[1], counted.to(dtype)
        shares = (marks / (k * marks.sum()).clamp(min=1)).repeat_interleave(k)
    return torch.zeros(size, dtype=dtype, device=ids.device).index_add(0, ids, shares)
