"""Mixture of Layer Experts: which second layer each layer runs, and how the two are mixed."""

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moc_cli.nn.autograd import autocast_dtype, inject
from moc_cli.nn.base import MixtureBase
from moc_cli.nn.forward import stored_route
from moc_cli.nn.gate import GATES, probabilities
from moc_cli.nn.vote import Ballot, Level, Route, Voters, decide, poll, shares_of
from moc_cli.nn.watch import Decision

POOL = "shared"


@dataclass(eq=False)
class LayerSite:
    """One layer t. `choice` and `loss` are slots of the last forward, detached, as in `Site`."""

    index: int
    pool: str = POOL
    choice: Tensor | None = None
    loss: Tensor | None = None

    @property
    def name(self) -> str:
        return str(self.index)


class LayerMixture(MixtureBase):
    """h ← w·u_t(h) + (1−w)·u_j(h), u a whole layer; where j = t, h ← u_t(h).

    One gate over the L layers, shared by all that mix, reads h; j is the layer that the tokens'
    `vote` ranks first: of the whole batch in training, of each row in evaluation, kept for the rest
    of a generation. Balance loss of a layer: L·P̄_j, summed over the layers, times λ (MoLEx, arXiv
    2503.11144).

    Learned: the gate, trained by the balance loss alone, since one choice has weight 1 whatever its
    probability; and, where `weight` is None, two scalars whose softmax is (w, 1−w), at first
    (`start`, 1 − `start`).
    """

    top_k = 1

    def __init__(
        self,
        layers: int,
        width: int,
        *,
        weight: float | None = 0.95,
        start: float = 0.95,
        gate: str = "cosine",
        projection_dim: int = 256,
        bias: bool = False,
        vote: str = "mean",
        balance_weight: float = 0.01,
        generator: torch.Generator | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.weight = weight
        self.vote = vote
        self.balance_weight = balance_weight
        self.sites = [LayerSite(index) for index in range(layers)]
        self.pools = {POOL: list(range(layers))}
        scorer = GATES[gate](width, layers, projection_dim, generator, device, bias)
        self.gates = nn.ModuleDict({POOL: scorer})
        if weight is None:
            logits = torch.tensor([math.log(start), math.log(1 - start)], dtype=torch.float32)
            self.weight_logits = nn.Parameter(logits.to(device))

    def mix(self, first: Tensor, second: Tensor) -> Tensor:
        """w·first + (1−w)·second, in first's type."""
        if self.weight is not None:
            return self.weight * first + (1 - self.weight) * second
        weights = self.weight_logits.softmax(dim=0).to(first.dtype)
        return weights[0] * first + weights[1] * second

    def route(self, site: LayerSite, h: Tensor, recompute: bool = False) -> tuple[Route, Tensor]:
        """The layer's route for h (B, T, d), and in training its balance loss L·P̄_j.

        With `recompute` the gate's activations are not kept for the backward pass.
        """
        site.choice = site.loss = None
        forward, store = self.current, self.current.store
        earlier = None if store is None else stored_route(store.routes, site.index, h.shape[0])
        if earlier is not None and forward.deciding is None:
            return earlier, h.new_zeros(())
        if earlier is None and forward.past:
            raise RuntimeError(
                f"layer {site.name}: the cache was filled without this mixture, so the second "
                "layer has no keys and values of its tokens"
            )
        if recompute and torch.is_grad_enabled():
            route, loss, ballot = checkpoint(
                self._vote, h, forward.valid, use_reentrant=False, preserve_rng_state=False
            )
        else:
            route, loss, ballot = self._vote(h, forward.valid)
        self._show(site, Decision(self._level(), route, ballot, None), h.shape[:2], earlier)
        route = self._take(site, route, earlier)
        if store is not None:
            store.routes[site.index] = route
        return route, loss

    def _vote(self, h: Tensor, valid: Tensor | None) -> tuple[Route, Tensor, Ballot]:
        """Route, balance loss and ballot, in float32 under autocast too."""
        is_plain = autocast_dtype(h.device) is None
        with nullcontext() if is_plain else torch.autocast(h.device.type, enabled=False):
            return self._decide(h, valid)

    def _decide(self, h: Tensor, valid: Tensor | None) -> tuple[Route, Tensor, Ballot]:
        p = probabilities(self.gates[POOL](h))  # (B, T, L)
        voters = Voters.of(p.shape[:2], valid, self._level(), p.device, p.dtype)
        ballot = poll(p, voters, 1, self.vote)
        route = decide(ballot, 1, "renormalized").detach()
        if not self.training:
            return route, p.new_zeros(()), ballot
        size = len(self.sites)
        share = shares_of(route, size, p.dtype)
        return route, voters.balance(ballot.mean, share, size).value(), ballot

    def _level(self) -> Level:
        return "batch" if self.training else "sample"

    def settle(self, site: LayerSite, h: Tensor, loss: Tensor) -> Tensor:
        """The layer's output h, its backward pass bound to the balance loss while training.

        Every parameter gets a gradient then, zero where nothing depends on it.
        """
        if not (self.training and torch.is_grad_enabled()):
            return h
        if self.balance_weight:
            site.loss = loss.detach()
        if self.weight is None:
            h = inject(h, self.weight_logits.sum(), lambda: 0.0)
        return inject(h, loss, self.current.scaled(self.balance_weight, self.loss_scale))
