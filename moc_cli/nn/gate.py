"""The shared gate: token probabilities, the vote that turns them into a route, the balance loss.

Shapes: B rows, T tokens, d width, N controls in the pool, K routed controls, V decisions (1 for a
batch, B for rows, B·T for tokens), S tokens that vote on one decision.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Level = Literal["batch", "sample", "token"]
Estimator = Literal["renormalized", "straight_through", "probability"]


@dataclass
class Route:
    """Which controls were chosen and with what weight: `ids` and `weights` are (V, K)."""

    ids: Tensor
    weights: Tensor
    _picks: list[list[int]] | None = field(default=None, repr=False)
    _groups: list[tuple[int, Tensor, Tensor]] | None = field(default=None, repr=False)

    @property
    def voters(self) -> int:
        return self.ids.shape[0]

    def picks(self) -> list[list[int]]:
        """The ids on the host; read from the device once."""
        if self._picks is None:
            self._picks = self.ids.tolist()
        return self._picks

    def groups(self) -> list[tuple[int, Tensor, Tensor]]:
        """(control, its voters (V_k,), its slot among each voter's K (V_k,)) of controls in use."""
        if self._groups is None:
            used = sorted({k for row in self.picks() for k in row})
            places = [(k, (self.ids == k).nonzero()) for k in used]
            self._groups = [(k, place[:, 0], place[:, 1]) for k, place in places]
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


def _new_bias(size: int, device: str) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=torch.float32, device=device))


def _draw_bias(
    bias: nn.Parameter | None, weight: nn.Parameter, generator: torch.Generator | None
) -> None:
    if bias is not None:
        bound = 1 / math.sqrt(weight.shape[1])
        nn.init.uniform_(bias, -bound, bound, generator=generator)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class LinearGate(nn.Module):
    """logits = W x (+ b), W (N, d) kaiming-uniform(a=√5), b as nn.Linear's; no projection."""

    def __init__(
        self,
        width: int,
        size: int,
        projection_dim: int = 0,
        generator: torch.Generator | None = None,
        device: str = "cpu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, width, dtype=torch.float32, device=device))
        self.bias = _new_bias(size, device) if bias else None
        if device != "meta":
            self.reset(generator)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the start values."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=generator)
        _draw_bias(self.bias, self.weight, generator)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> logits (B, T, N), in float32 or wider."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return _linear(x, self.weight, self.bias, dtype)


class CosineGate(nn.Module):
    """logits = s · cos(P x, e_k), normalised over the feature axis; s = exp(min(log τ, log 100)).

    P (p, d) kaiming-uniform(a=√5), e (N, p) ~ N(0, 0.01²), log τ starts at log 2 (after Tutel).
    With a bias it is P x + b.
    """

    MAX_LOG_TEMPERATURE = math.log(100)

    def __init__(
        self,
        width: int,
        size: int,
        projection_dim: int,
        generator: torch.Generator | None = None,
        device: str = "cpu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        shapes = (projection_dim, width), (size, projection_dim), ()
        self.projection, self.experts, self.log_temperature = (
            nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)) for shape in shapes
        )
        self.bias = _new_bias(projection_dim, device) if bias else None
        if device != "meta":
            self.reset(generator)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the start values."""
        nn.init.kaiming_uniform_(self.projection, a=math.sqrt(5), generator=generator)
        _draw_bias(self.bias, self.projection, generator)
        nn.init.normal_(self.experts, std=0.01, generator=generator)
        nn.init.constant_(self.log_temperature, math.log(2))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> logits (B, T, N), in float32 or wider."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        features = F.normalize(_linear(x, self.projection, self.bias, dtype), dim=-1)
        experts = F.normalize(self.experts.to(dtype), dim=-1)
        temperature = self.log_temperature.clamp(max=self.MAX_LOG_TEMPERATURE).exp()
        return temperature.to(dtype) * F.linear(features, experts)


GATES: dict[str, type[LinearGate] | type[CosineGate]] = {"linear": LinearGate, "cosine": CosineGate}


def probabilities(gate: nn.Module, x: Tensor, exclude: int | None = None) -> Tensor:
    """softmax of the logits over the pool (B, T, N); control `exclude` gets probability 0."""
    logits = gate(x)
    if exclude is not None:
        away = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        away[exclude] = True
        logits = logits.masked_fill(away, float("-inf"))
    p: Tensor = logits.softmax(dim=-1)
    return p


def top_k(scores: Tensor, k: int) -> Tensor:
    """The indices of the k largest along the last axis; equal scores: the lower index first."""
    if k == 1:
        return scores.argmax(dim=-1, keepdim=True)
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def own_picks(p: Tensor, k: int) -> Tensor:
    """1 where a control is among the token's own k most probable, else 0; like p, no gradient."""
    return torch.zeros_like(p).scatter_(-1, top_k(p.detach(), k), 1.0)


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
    return (own_picks(p, k) * weight[..., None]).sum(dim=1)


VOTES: dict[str, Vote] = {"mean": Vote(), "mode": Vote(_count_picks)}


@dataclass
class Ballot:
    """What the tokens of each decision say under one of VOTES.

    `sums` (V, N) of their probabilities, `voters` (V, 1) the number of tokens, `scores` (V, N) what
    the vote ranks by, None where that is the mean probability.
    """

    sums: Tensor
    voters: Tensor
    scores: Tensor | None
    vote: str

    @property
    def mean(self) -> Tensor:
        """The mean probabilities P̄ (V, N)."""
        return self.sums / self.voters.clamp(min=1)

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
        sums, voters = self.sums + sign * other.sums, self.voters + sign * other.voters
        return Ballot(sums, voters, scores, self.vote)

    def rows(self, change: Callable[[Tensor], Tensor]) -> "Ballot":
        """The ballot with its rows reordered, selected or repeated by `change`."""
        scores = None if self.scores is None else change(self.scores)
        return Ballot(change(self.sums), change(self.voters), scores, self.vote)


def poll(p: Tensor, valid: Tensor | None, level: Level, k: int, vote: str) -> Ballot:
    """Collect the votes of p (B, T, N) by the tokens with `valid` (B, T), at one level.

    At level `token` every token decides for itself, padding too (its output is never read). Raises
    ValueError for a vote that is not in VOTES.
    """
    if vote not in VOTES:
        raise ValueError(f"vote '{vote}' is not known; allowed: {', '.join(VOTES)}")
    if level == "token":
        p = p.flatten(0, 1)[:, None]  # (B·T, 1, N)
        valid = None
    elif level == "batch":
        p = p.flatten(0, 1)[None]  # (1, B·T, N)
        valid = None if valid is None else valid.flatten()[None]
    weight = p.new_ones(p.shape[:2]) if valid is None else valid.to(p.device, p.dtype)
    score = VOTES[vote].score
    scores = None if score is None else score(p.detach(), weight, k)
    voters = weight.sum(dim=1, keepdim=True)
    return Ballot((p * weight[..., None]).sum(dim=1), voters, scores, vote)


def decide(ballot: Ballot, k: int, estimator: Estimator) -> Route:
    """The route (V, K) that the ballot gives, with weights π (eq. 10 where there is one voter).

    The K controls that the vote ranks first. π_k = P̄_k / Σ_S P̄ (`renormalized`), the same with the
    gradient of P̄ (`straight_through`), or P̄_k itself (`probability`).
    """
    mean = ballot.mean
    ids = top_k(mean.detach(), k)
    if ballot.scores is not None:
        by_mean = mean.detach().sort(dim=-1, descending=True, stable=True).indices
        ids = by_mean.gather(-1, top_k(ballot.scores.gather(-1, by_mean), k))
    chosen = mean.gather(-1, ids)
    if estimator == "probability":
        weights = chosen
    elif estimator == "renormalized" and k == 1:
        # Exactly 1 with a gradient of exactly 0: c/c would leave rounding noise in the gate's
        # gradient, and Adam scales noise up to full steps.
        weights = torch.ones_like(chosen) + 0 * chosen
    else:
        # A control without any probability can be chosen by its score alone: never 0/0.
        weights = chosen / chosen.sum(-1, keepdim=True).clamp(min=torch.finfo(chosen.dtype).tiny)
        if estimator == "straight_through":
            weights = weights.detach() + chosen - chosen.detach()
    return Route(ids, weights)


def balance_loss(
    p: Tensor, valid: Tensor | None, k: int, size: int, route: Route | None = None
) -> Tensor:
    """N · Σ_j f_j·P_j of one site over its valid tokens; perfectly balanced use gives 1.

    P_j is the mean of p_ij; f_j the share of picks that went to j, without gradient: of the
    tokens' own top K, or of the decisions in `route` where one is given (as MoLEx's code does).
    `size` is N, or N − 1 where the local control is excluded.
    """
    weight = p.new_ones(p.shape[:2]) if valid is None else valid.to(p.dtype)
    weight = weight / weight.sum().clamp(min=1)  # (B, T)
    mean = (p * weight[..., None]).sum(dim=(0, 1))  # (N,)
    if route is None:
        share = (own_picks(p, k) * weight[..., None]).sum(dim=(0, 1)) / k
    else:
        share = torch.zeros_like(mean)
        ones = torch.full_like(route.ids.flatten(), 1 / route.ids.numel(), dtype=p.dtype)
        share = share.index_add(0, route.ids.flatten(), ones)
    return size * (share * mean).sum()


Coefficient = Callable[[], float | Tensor]


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, coefficient: Coefficient) -> Tensor:
        ctx.coefficient = coefficient
        ctx.like = loss.dtype, loss.device
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        dtype, device = ctx.like
        return grad, torch.as_tensor(ctx.coefficient(), dtype=dtype, device=device), None


def inject(x: Tensor, loss: Tensor, coefficient: Coefficient) -> Tensor:
    """Identity on x whose backward also sends `coefficient()` into `loss`.

    It makes loss part of the objective without a module holding a tensor that carries a graph,
    which would keep a recomputed layer alive under activation checkpointing.
    """
    result: Tensor = _Inject.apply(x, loss, coefficient)  # type: ignore[no-untyped-call]
    return result
