"""Every control and gate of one model, and the update that each site adds (eq. 9)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast, get_args

import torch
from torch import Tensor, nn

from moc_cli.nn.control import Control, StackedControls, WeightedControls, combine
from moc_cli.nn.gate import (
    GATES,
    VOTES,
    Ballot,
    Coefficient,
    Estimator,
    Level,
    Route,
    balance_loss,
    decide,
    inject,
    poll,
    probabilities,
)
from moc_cli.nn.watch import Decision, Watcher, new_decisions

_KINDS: dict[str, tuple[str, ...]] = {
    "gate": tuple(GATES),
    "estimator": get_args(Estimator),
    "level": get_args(Level),
    "vote": tuple(VOTES),
    "decode": ("frozen", "running"),
    "balance_f": ("top_k", "choice"),
    "balance_reduce": ("sum", "mean"),
}


@dataclass(frozen=True)
class Routing:
    """How routes are decided and what keeps them balanced; `top_k` = 0 means no gate at all."""

    top_k: int = 1
    alpha: float = 0.95
    share_gate: bool = True
    gate: str = "cosine"
    projection_dim: int = 256
    estimator: Estimator = "renormalized"
    level: Level = "batch"
    vote: str = "mean"
    exclude_local: bool = False
    decode: str = "frozen"
    balance_weight: float = 0.01
    balance_f: str = "top_k"
    balance_reduce: str = "sum"

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown kind, and for two kinds that exclude each other."""
        for name, allowed in _KINDS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"routing.{name}: '{getattr(self, name)}' is not known; allowed: "
                    f"{', '.join(allowed)}"
                )
        if self.decode == "running" and not VOTES[self.vote].additive:
            raise ValueError(
                f"routing.decode: 'running' adds new tokens to a vote, and the scores of vote "
                f"'{self.vote}' do not add up; use decode 'frozen'"
            )


@dataclass
class RouteStore:
    """What one generation remembers between its forwards: a route (frozen) or ballot per site.

    `stacks` hold the routes' controls once they are used for one token at a time. `waiting` (B,)
    marks the rows of which only padding has been seen, None where there are none. Once `settled`,
    every later forward uses what is here, whatever its mask. Without a gate there are no routes.
    """

    gated: bool = True
    settled: bool = False
    routes: dict[int, Route] = field(default_factory=dict)
    ballots: dict[int, Ballot] = field(default_factory=dict)
    stacks: dict[int, StackedControls] = field(default_factory=dict)
    waiting: Tensor | None = None

    def settle(self) -> None:
        """Called after each forward that fills the cache."""
        decided = bool(self.routes) and not self.ballots
        self.settled = self.waiting is None and (decided or not self.gated)

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do to the rows what the cache does to its own: reorder, select or repeat them."""
        self.routes = {site: route.rows(change) for site, route in self.routes.items()}
        self.ballots = {site: ballot.rows(change) for site, ballot in self.ballots.items()}
        self.stacks = {site: stack.rows(change) for site, stack in self.stacks.items()}
        if self.waiting is not None:
            self.waiting = change(self.waiting)


def stored_route(routes: dict[int, Route], index: int, rows: int) -> Route | None:
    """The route of a site, None before its first; RuntimeError where it is for other rows."""
    route = routes.get(index)
    if route is not None and route.voters != rows:
        raise RuntimeError(f"the cache holds routes of {route.voters} rows, the input has {rows}")
    return route


@dataclass
class Forward:
    """One forward of the model: which tokens vote (B, T; None = all), and its generation.

    `deciding` (B,) marks the rows whose first real token comes in a later forward than the others':
    they decide now, while the others keep their routes. None where there are none. `shape` is
    (B, T), for blocks that see rows and tokens as one axis; `past` counts the cache's tokens.

    For watchers: the rows are `copies` of each of the user's own, as beams are; `repeat` marks a
    forward that takes its generation's decisions once more, `ended` one that is over, so that what
    runs in it now is the recompute of a backward pass.

    `loss_scale` is what the model's own loss was multiplied by, known when its backward begins.
    """

    valid: Tensor | None = None
    store: RouteStore | None = None
    deciding: Tensor | None = None
    shape: tuple[int, int] | None = None
    past: int = 0
    copies: int = 1
    repeat: bool = False
    ended: bool = False
    loss_scale: float | Tensor = 1.0

    def scaled(self, weight: float, scale: float | None) -> Coefficient:
        """`weight` times `scale`, or where that is None, times that of the model's own loss."""
        return lambda: weight * (self.loss_scale if scale is None else scale)


@dataclass(eq=False)
class Site:
    """One place in the model where a control is added: its layer, its block, its pool.

    `local` is its own place in its pool. `choice` and `loss` are slots: overwritten by each
    forward, never appended to, and detached.
    """

    index: int
    layer: int
    block: str
    pool: str
    local: int
    choice: Tensor | None = None
    loss: Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.block}"


class Mixture(nn.Module):
    """x_{t+1} = x_t + f_t(x_t) + α·g_t(x_t) + (1−α)·Σ_{k∈S_K} π_k·g_k(x_t)  (eq. 9).

    Learned: one control a site and one gate a pool. Its state dict is the adapter file's:
    `controls.<layer>.<attn|ffn>.{A,B}`, `gates.<shared|attn|ffn>.*`. With `top_k` = 0 it is
    Parallel Control: weight 1 instead of α, no gate, no balance loss.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        blocks: tuple[str, ...],
        rank: int,
        scale: float,
        routing: Routing,
        *,
        generator: torch.Generator | None = None,
        device: str = "cpu",
    ) -> None:
        super().__init__()
        self.scale = scale
        self.routing = routing
        self.active = True
        self.loss_scale: float | None = None  # None: that of the model's own loss
        self.current = Forward()
        self.watchers: list[Watcher] = []
        self.reroute: Callable[[Site, Route], Route] | None = None  # another route than the voted
        self.controls = nn.ModuleList(
            nn.ModuleDict({block: Control(width, rank, generator, device) for block in blocks})
            for _ in range(layers)
        )
        shared = routing.share_gate and len(blocks) > 1
        self.sites: list[Site] = []
        self.pools: dict[str, list[int]] = {}
        for layer in range(layers):
            for block in blocks:
                name = "shared" if shared else block
                pool = self.pools.setdefault(name, [])
                self.sites.append(Site(len(self.sites), layer, block, name, len(pool)))
                pool.append(self.sites[-1].index)
        self.gates = nn.ModuleDict()
        if routing.top_k:
            make_gate = GATES[routing.gate]
            for name, pool in self.pools.items():
                self.gates[name] = make_gate(
                    width, len(pool), routing.projection_dim, generator, device
                )

    def control(self, index: int) -> Control:
        site = self.sites[index]
        layer = cast(nn.ModuleDict, self.controls[site.layer])
        return cast(Control, layer[site.block])

    def new_store(self) -> RouteStore:
        """Begin a generation."""
        return RouteStore(gated=self.routing.top_k > 0)

    def add(self, site: Site, x: Tensor, output: Tensor) -> Tensor:
        """A block's output (B, T, d) with the site's update for the block's input x added to it."""
        if not self.active:
            return output
        update = self.update(site, x)
        for watcher in self.watching():
            watcher.added(site, output, update)
        return output + update

    def update(self, site: Site, x: Tensor) -> Tensor:
        """What this site adds to its block's output for the input x (B, T, d); same shape, type."""
        if x.ndim == 2 and self.current.shape is not None:  # (B·T, d)
            return self.update(site, x.reshape(*self.current.shape, -1)).flatten(0, 1)
        site.choice = None
        stack = self._stack(site, x)
        if stack is not None:
            return stack.update(x)
        routing = self.routing
        if not routing.top_k:
            return self.combine(site, None).update(x)
        route, loss = self.route(site, x)
        # Before the products: a recompute in the backward pass ends at the last tensor they save.
        site.loss = None if loss is None else loss.detach()
        update = self.combine(site, route).update(x)
        if loss is not None:
            weight = routing.balance_weight
            if routing.balance_reduce == "mean":
                weight /= len(self.sites)
            return inject(update, loss, self.current.scaled(weight, self.loss_scale))
        return update

    def combine(self, site: Site, route: Route | None) -> WeightedControls:
        """The controls that a route uses at a site, with α, 1−α, π and the scale as weights."""
        pool, own = self.pools[site.pool], self.control(site.index)
        return combine(own, lambda k: self.control(pool[k]), route, self.routing.alpha, self.scale)

    def _stack(self, site: Site, x: Tensor) -> StackedControls | None:
        """The stacked controls of a generation that feeds one token at a time, its route settled.

        None elsewhere: in training, in a prefill, and where each token is routed anew; nor where
        the controls want gradients, which copies made in an earlier step would not pass on.
        """
        store = self.current.store
        if store is None or not store.settled or x.shape[1] > 1 or self.training:
            return None
        if torch.is_grad_enabled() and self.control(site.index).A.requires_grad:
            return None
        if site.index not in store.stacks:
            self._fill(store, site, x)
        return store.stacks[site.index]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type for it
    def _fill(self, store: RouteStore, site: Site, x: Tensor) -> None:
        """Stack a site's controls; reads the route from the device, once a generation."""
        route = stored_route(store.routes, site.index, x.shape[0])
        store.stacks[site.index] = self.combine(site, route).stack(x.dtype)

    def route(self, site: Site, x: Tensor) -> tuple[Route, Tensor | None]:
        """The site's route for x (B, T, d), and its balance loss while training.

        Training votes at `level`. Evaluation gives each row its own route (each token at level
        `token`); while a generation's store holds the row's route, that is reused (`frozen`) or
        its ballot grows by the new tokens first (`running`).
        """
        routing, forward = self.routing, self.current
        level = routing.level
        if level == "batch" and not self.training:
            level = "sample"
        store = forward.store if level == "sample" and not self.training else None
        earlier = None if store is None else stored_route(store.routes, site.index, x.shape[0])
        if earlier is not None and forward.deciding is None:
            return earlier, None

        p = self._probabilities(site, x)
        ballot = poll(p, forward.valid, level, routing.top_k, routing.vote)
        if store is not None and routing.decode == "running":
            if site.index in store.ballots:
                ballot = store.ballots[site.index] + ballot
            store.ballots[site.index] = ballot
        route = decide(ballot, routing.top_k, routing.estimator)
        self._show(site, Decision(level, route, ballot, None, p, forward.valid), earlier)
        if self.reroute is not None:
            route = self.reroute(site, route)
        site.choice = route.ids
        if earlier is not None and forward.deciding is not None:
            site.choice = route.ids[forward.deciding]
            route = earlier.replaced(forward.deciding, route)
        if store is not None and routing.decode == "frozen":
            store.routes[site.index] = route.detach()

        if not (self.training and routing.balance_weight):
            return route, None
        size = p.shape[-1] - routing.exclude_local
        chosen = route if routing.balance_f == "choice" else None
        return route, balance_loss(p, forward.valid, routing.top_k, size, chosen)

    def _probabilities(self, site: Site, x: Tensor) -> Tensor:
        """Each token's probabilities (B, T, N); RuntimeError for a mask of another shape."""
        valid = self.current.valid
        if valid is not None and valid.shape != x.shape[:2]:
            raise RuntimeError(
                f"site {site.name}: the mask of the voting tokens is {tuple(valid.shape)}, "
                f"the block's input {tuple(x.shape[:2])}"
            )
        local = site.local if self.routing.exclude_local else None
        return probabilities(self.gates[site.pool], x, local)

    def _show(self, site: Site, decision: Decision, earlier: Route | None) -> None:
        """Let watchers see a decision; of rows with an earlier route those that decide now."""
        for watcher in self.watching():
            forward, p = self.current, decision.probabilities
            assert p is not None
            deciding = None if earlier is None else forward.deciding
            decision.is_new = new_decisions(
                (p.shape[0], p.shape[1]), forward.valid, deciding, decision.level, forward.copies
            )
            watcher.decided(site, decision)

    def watching(self) -> Sequence[Watcher]:
        """Who sees what happens now: nobody in a recompute, or where a decision is repeated."""
        return () if self.current.ended or self.current.repeat else self.watchers

    def balance(self) -> float | None:
        """λ·Σ_sites of the last training forward (or λ·mean), read from the device; for logs."""
        losses = [site.loss for site in self.sites if site.loss is not None]
        if not losses:
            return None
        total = torch.stack(losses).sum()
        if self.routing.balance_reduce == "mean":
            total = total / len(self.sites)
        return self.routing.balance_weight * total.item()
