"""Every control and gate of one model, and the update that each site adds (eq. 9)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor, nn

from moc_cli.nn.control import Control, mixed_update
from moc_cli.nn.gate import (
    Ballot,
    CosineGate,
    Estimator,
    InjectLoss,
    Level,
    LinearGate,
    Route,
    Vote,
    balance_loss,
    decide,
    poll,
    probabilities,
)
from moc_cli.nn.stacked import Bank, members, stack
from moc_cli.nn.watch import Decision, Watcher, newly_decided

_KINDS: dict[str, tuple[str, ...]] = {
    "gate": ("linear", "cosine"),
    "estimator": get_args(Estimator),
    "level": get_args(Level),
    "vote": get_args(Vote),
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
    vote: Vote = "mean"
    exclude_local: bool = False
    decode: str = "frozen"
    balance_weight: float = 0.01
    balance_f: str = "top_k"
    balance_reduce: str = "sum"

    def __post_init__(self) -> None:
        """Raise ValueError for a kind that is not known here, which a file may name."""
        for name, allowed in _KINDS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"routing.{name}: '{getattr(self, name)}' is not known; allowed: "
                    f"{', '.join(allowed)}"
                )


@dataclass
class RouteStore:
    """What one generation remembers between its forwards: a route (frozen) or ballot per site.

    `banks` stack the routes' controls once they are used for a token at a time. `waiting` (B,)
    marks the rows of which only padding has been seen, None where there are none. Once `settled`,
    every later forward uses what is here, whatever its mask. Without a gate there are no routes.
    """

    gated: bool = True
    settled: bool = False
    routes: dict[int, Route] = field(default_factory=dict)
    ballots: dict[int, Ballot] = field(default_factory=dict)
    banks: dict[int, Bank] = field(default_factory=dict)
    waiting: Tensor | None = None

    def settle(self) -> None:
        """Called after each forward that fills the cache."""
        known = bool(self.routes) and not self.ballots
        self.settled = self.waiting is None and (known or not self.gated)

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do to the rows what the cache does to its own: reorder, select or repeat them."""
        self.routes = {site: route.rows(change) for site, route in self.routes.items()}
        self.ballots = {site: ballot.rows(change) for site, ballot in self.ballots.items()}
        self.banks = {site: bank.rows(change) for site, bank in self.banks.items()}
        if self.waiting is not None:
            self.waiting = change(self.waiting)


@dataclass
class Pass:
    """One forward of the model: which tokens vote (B, T; None = all), and its generation.

    `late` (B,) marks the rows whose first real token comes in a later forward than the others':
    they decide now, while the others keep their routes. None where there are none. `shape` is
    (B, T), for blocks that see rows and tokens as one axis; `past` counts the cache's tokens.

    For those who watch: the rows are `copies` of each of the user's own, as beams are; `repeat`
    marks a forward that takes its generation's decisions once more, `ended` one that is over, so
    that what runs in it now is the recompute of a backward pass.
    """

    valid: Tensor | None = None
    store: RouteStore | None = None
    late: Tensor | None = None
    shape: tuple[int, int] | None = None
    past: int = 0
    copies: int = 1
    repeat: bool = False
    ended: bool = False


class Site:
    """One place in the model where a control is added: its layer, its block, its pool.

    A plain object, so that hooks can be its bound methods and still be copied and pickled.
    `choice` and `loss` are slots: overwritten by each forward, never appended to, and detached.
    """

    def __init__(self, mixture: "Mixture", index: int, layer: int, block: str, pool: str) -> None:
        self.mixture = mixture
        self.index = index
        self.layer = layer
        self.block = block
        self.pool = pool
        self.choice: Tensor | None = None
        self.loss: Tensor | None = None
        self._state: Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.block}"

    @property
    def local(self) -> int:
        """This site's own place in its pool."""
        return self.mixture.pools[self.pool].index(self.index)

    def read(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook where the block's input x_t is seen."""
        self._state = args[0] if args else kwargs["hidden_states"]

    def write(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        """Forward hook where the block's output is known: adds the site's update to it."""
        state, self._state = self._state, None
        if state is None:
            raise RuntimeError(f"site {self.name}: the block wrote its output before its input")
        if not self.mixture.active:
            return output
        update = self.mixture.update(self, state)
        for watcher in self.mixture.watching():
            if watcher.measures:
                watcher.added(self, output[0] if isinstance(output, tuple) else output, update)
        if isinstance(output, tuple):
            return (output[0] + update, *output[1:])
        return output + update


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
        self.loss_scale = 1.0
        self.current = Pass()
        self.watchers: list[Watcher] = []
        self.reroute: Callable[[Site, Route], Route] | None = None  # another route than the voted
        self.controls = nn.ModuleList(
            nn.ModuleDict({block: Control(width, rank, generator, device) for block in blocks})
            for _ in range(layers)
        )
        shared = len(blocks) == 1 or routing.share_gate
        name = blocks[0] if len(blocks) == 1 else "shared"
        self.sites = [
            Site(self, layer * len(blocks) + i, layer, block, name if shared else block)
            for layer in range(layers)
            for i, block in enumerate(blocks)
        ]
        self.pools: dict[str, list[int]] = {}
        for site in self.sites:
            self.pools.setdefault(site.pool, []).append(site.index)
        self.gates = nn.ModuleDict()
        if routing.top_k:
            for pool, members in self.pools.items():
                if routing.gate == "linear":
                    gate: nn.Module = LinearGate(width, len(members), generator, device)
                else:
                    gate = CosineGate(
                        width, len(members), routing.projection_dim, generator, device
                    )
                self.gates[pool] = gate

    def control(self, index: int) -> Control:
        site = self.sites[index]
        return self.controls[site.layer][site.block]

    def new_store(self) -> RouteStore:
        """Begin a generation."""
        return RouteStore(gated=self.routing.top_k > 0)

    def update(self, site: Site, x: Tensor) -> Tensor:
        """What this site adds to its block's output for the input x (B, T, d); same shape, type."""
        if x.ndim == 2 and self.current.shape is not None:  # (B·T, d)
            return self.update(site, x.unflatten(0, self.current.shape)).flatten(0, 1)
        site.choice = None
        bank = self.bank(site, x)
        if bank is not None:
            return bank.update(x)
        own = self.control(site.index)
        routing = self.routing
        if not routing.top_k:
            return own(x, self.scale)
        route, loss = self.route(site, x)
        # Before the products: a recompute in the backward pass ends at the last tensor they save.
        site.loss = None if loss is None else loss.detach()
        pool = [self.control(index) for index in self.pools[site.pool]]
        update = mixed_update(x, own, pool, route, routing.alpha, self.scale)
        if loss is not None:
            weight = routing.balance_weight * self.loss_scale
            if routing.balance_reduce == "mean":
                weight /= len(self.sites)
            update = InjectLoss.apply(update, loss, weight)
        return update

    def bank(self, site: Site, x: Tensor) -> Bank | None:
        """The stacked controls of a generation that feeds one token at a time, its route settled.

        None elsewhere: in training, in a prefill, and where each token is routed anew; nor where
        the controls want gradients, which copies made in an earlier step would not pass on.
        """
        store = self.current.store
        if store is None or not store.settled or x.shape[1] > 1 or self.training:
            return None
        if torch.is_grad_enabled() and self.control(site.index).A.requires_grad:
            return None
        known = store.banks.get(site.index)
        if known is None:
            known = store.banks[site.index] = self._stack(site, x, store.routes.get(site.index))
        return known

    @torch.compiler.disable  # reads the routes from the device, once a generation
    def _stack(self, site: Site, x: Tensor, route: Route | None) -> Bank:
        if route is not None and route.voters != x.shape[0]:
            raise RuntimeError(
                f"site {site.name}: the cache holds routes of {route.voters} rows, the input has "
                f"{x.shape[0]}"
            )
        order, weights = members(site.index, self.pools[site.pool], route, self.routing.alpha)
        if weights is None:
            wide = torch.promote_types(x.dtype, torch.float32)
            weights = torch.ones(1, 1, dtype=wide, device=x.device)
        controls = [self.control(index) for index in order]
        return stack(controls, self.scale * weights, x.dtype)

    def route(self, site: Site, x: Tensor) -> tuple[Route, Tensor | None]:
        """The site's route for x (B, T, d), and its balance loss while training.

        Training votes at `level`. Evaluation gives each row its own route (each token at level
        `token`); while a generation's store holds the row's route, that is reused (`frozen`) or
        its ballot grows by the new tokens first (`running`).
        """
        routing, store, valid = self.routing, self.current.store, self.current.valid
        level: Level = routing.level if self.training else _evaluation_level(routing.level)
        keep = store is not None and not self.training and level == "sample"
        kept = store.routes.get(site.index) if keep else None
        if kept is not None and kept.voters != x.shape[0]:
            raise RuntimeError(
                f"site {site.name}: the cache holds routes of {kept.voters} rows, the input has "
                f"{x.shape[0]}"
            )
        late = self.current.late
        if kept is not None and late is None:
            return kept, None
        if valid is not None and valid.shape != x.shape[:2]:
            raise RuntimeError(
                f"site {site.name}: the mask of the voting tokens is {tuple(valid.shape)}, "
                f"the block's input {tuple(x.shape[:2])}"
            )
        exclude = site.local if routing.exclude_local else None
        p = probabilities(self.gates[site.pool], x, exclude)
        ballot = poll(p, valid, level, routing.top_k, routing.vote)
        if keep and routing.decode == "running":
            if site.index in store.ballots:
                ballot = store.ballots[site.index] + ballot
            store.ballots[site.index] = ballot
        route = decide(ballot, routing.top_k, routing.vote, routing.estimator)
        for watcher in self.watching():
            alone = None if kept is None else late  # of kept routes, only late rows' are new
            counted = newly_decided(x.shape[:2], valid, alone, level, self.current.copies)
            watcher.decided(site, Decision(level, route, ballot, counted, p, valid))
        if self.reroute is not None:
            route = self.reroute(site, route)
        site.choice = route.ids
        if kept is not None:
            site.choice = route.ids[late]
            route = kept.replaced(late, route)
        if keep and routing.decode == "frozen":
            store.routes[site.index] = route.detach()
        if not (self.training and routing.balance_weight):
            return route, None
        size = p.shape[-1] - (exclude is not None)
        chosen = route if routing.balance_f == "choice" else None
        return route, balance_loss(p, valid, routing.top_k, size, chosen)

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


def _evaluation_level(level: Level) -> Level:
    return "token" if level == "token" else "sample"
