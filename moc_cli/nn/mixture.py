"""Every control and gate of one model, and the update that each site adds (eq. 9)."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from moc_cli.nn.autograd import autocast_dtype, inject
from moc_cli.nn.base import MixtureBase
from moc_cli.nn.control import (
    Control,
    ControlPool,
    StackedControls,
    WeightedControls,
    combine,
)
from moc_cli.nn.forward import RouteStore, stored_route
from moc_cli.nn.gate import GATES, Gate, probabilities
from moc_cli.nn.routing import Routing
from moc_cli.nn.site import Site
from moc_cli.nn.vote import (
    BalanceLoss,
    JointVotes,
    Level,
    Route,
    decide,
    poll,
    shares_of,
)
from moc_cli.nn.watch import Decision


class Mixture(MixtureBase):
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
        self.top_k = routing.top_k
        self.joint: JointVotes | None = None  # in training with level batch; see routing.sync
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
        self.balance_weight = routing.balance_weight
        if routing.balance_reduce == "mean":
            self.balance_weight /= len(self.sites)
        self.gates = nn.ModuleDict()
        if routing.top_k:
            make_gate = GATES[routing.gate]
            for name, pool in self.pools.items():
                self.gates[name] = make_gate(
                    width, len(pool), routing.projection_dim, generator, device
                )

    def prepare(self, dtype: torch.dtype) -> None:
        """Make what all sites of a forward share, for blocks' inputs in a type.

        Called before its first site, outside of what is recomputed or compiled: so one compiled
        graph serves all layers, and a recomputation sees the same values.
        """
        device, forward = self.control(0).A.device, self.current
        self._place_sites(device)
        for site in self.sites:
            site.choice = None
        settled = forward.store is not None and forward.store.settled
        if not self.active or settled or forward.shape is None:
            return
        if self._level() != "token":
            self._pool(autocast_dtype(device) or dtype)
        if self.routing.top_k:
            forward.voters_of(forward.shape, self._level(), device, dtype)
            forward.prepared = {
                name: cast(Gate, gate).prepare() for name, gate in self.gates.items()
            }

    def _place_sites(self, device: torch.device) -> None:
        """Let every site know its numbers as tensors of a device."""
        place = self.sites[0].place
        if place is not None and place.device == device:
            return
        members = {
            name: torch.tensor(pool).to(device, non_blocking=True)
            for name, pool in self.pools.items()
        }
        for site in self.sites:
            site.place = torch.full((1, 1), site.index, device=device)
            site.members = members[site.pool]

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
        """What this site adds to its block's output for the input x (B, T, d); same shape.

        It is in x's type or, under autocast, in autocast's; routes are decided in float32.
        """
        if x.ndim == 2 and self.current.shape is not None:  # (B·T, d)
            return self.update(site, x.reshape(*self.current.shape, -1)).flatten(0, 1)
        packed = self.current.packed
        if packed is not None and len(x) == 1:  # two rows or more, once they are apart
            return packed.join(self.update(site, packed.split(x)))
        dtype = autocast_dtype(x.device)
        if dtype is None:
            return self._update(site, x, x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return self._update(site, x, dtype)

    def _update(self, site: Site, x: Tensor, dtype: torch.dtype) -> Tensor:
        site.choice = None
        self.current.reentrant |= self.training and not torch.is_grad_enabled()
        state = x.to(dtype)  # what the controls read; the gate reads x
        store = self.current.store
        if store is not None and not store.settled:
            store.dtypes[site.index] = dtype
        stack = self._stack(site, x, dtype)
        if stack is not None:
            return stack.update(state)
        if not self.routing.top_k:
            return self._products(site, state, None)
        route, balance = self.route(site, x)
        # Before the products: a recompute in the backward pass ends at the last tensor they save.
        shown = balance is not None and self.balance_weight > 0
        site.balance = balance.detach() if balance is not None and shown else None
        update = self._products(site, state, route)
        if balance is not None:
            weight = self.balance_weight * balance.size
            weight /= 1 if self.joint is None else self.joint.world  # each adds its part
            coefficient = self.current.scaled(weight, self.loss_scale)
            return inject(update, balance.means, coefficient, balance.slope)
        return update

    def _products(self, site: Site, x: Tensor, route: Route | None) -> Tensor:
        """The update of a site's controls for x (B, T, d) in the type of the products."""
        if route is not None and route.voters not in (1, len(x)):
            return self.combine(site, route).update(x)  # each decision has controls of its own
        pool = self._pool(x.dtype)
        self._place_sites(x.device)
        place, members = cast(Tensor, site.place), cast(Tensor, site.members)
        if route is None:
            return pool.update(x, place)
        ids = route.ids if len(self.pools) == 1 else members[route.ids]
        if self.routing.constant_weights and self.reroute is None:
            return pool.update(x, place, ids)
        return pool.update(x, place, ids, route.weights)

    def _pool(self, dtype: torch.dtype) -> ControlPool:
        """The stacked controls of this forward."""
        forward = self.current
        pool = forward.pools.get(dtype) if forward.shared else None
        compiling = torch.compiler.is_compiling()  # then a forward's end is not to be asked for
        if pool is None or (not compiling and forward.ended and pool.outdated()):
            controls = [self.control(site.index) for site in self.sites]
            routing = self.routing
            pool = ControlPool(controls, dtype, routing.alpha, self.scale, routing.top_k)
            if forward.shared:
                forward.pools[dtype] = pool
        return pool

    def combine(self, site: Site, route: Route | None) -> WeightedControls:
        """The controls that a route uses at a site, with α, 1−α, π and the scale as weights."""
        pool, local = self.pools[site.pool], self.control(site.index)
        return combine(
            local, lambda k: self.control(pool[k]), route, self.routing.alpha, self.scale
        )

    def _stack(self, site: Site, x: Tensor, dtype: torch.dtype) -> StackedControls | None:
        """The stacked controls of a generation that feeds one token at a time, its route settled.

        None elsewhere: in training, in a prefill, and where each token is routed again; nor where
        the controls want gradients, which copies made in an earlier step would not pass on.
        """
        store = self.current.store
        if store is None or not store.settled or x.shape[1] > 1 or self.training:
            return None
        if torch.is_grad_enabled() and self.control(site.index).A.requires_grad:
            return None
        if site.index not in store.stacks:
            stored_route(store.routes, site.index, x.shape[0])
            self._fill(store, site, dtype)
        return store.stacks[site.index]

    def fill(self, store: RouteStore, copies: int) -> None:
        """Stack the controls of all sites, for a compiled generation whose routes are settled.

        Their shapes depend on the number of rows alone, of which `copies` share each route.
        """
        for site in self.sites:
            self._fill(store, site, store.dtypes[site.index], copies)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type for it
    def _fill(
        self, store: RouteStore, site: Site, dtype: torch.dtype, copies: int | None = None
    ) -> None:
        """Stack a site's controls; the first site reads all routes from the device at once."""
        route, count = store.on_host(site.index), None
        if route is not None and copies is not None:
            used, pool = route.voters // copies * self.routing.top_k, self.pools[site.pool]
            count = 1 + min(used, len(pool))
        store.stacks[site.index] = self.combine(site, route).stack(dtype, count)

    def route(self, site: Site, x: Tensor) -> tuple[Route, BalanceLoss | None]:
        """The site's route for x (B, T, d), and its balance loss while training.

        Training votes at `level`. Evaluation gives each row its own route (each token at level
        `token`); while a generation's store holds the row's route, that is reused (`frozen`) or
        its ballot grows by the new tokens first (`running`).
        """
        routing, forward, level = self.routing, self.current, self._level()
        store = forward.store if level == "sample" and not self.training else None
        earlier = None if store is None else stored_route(store.routes, site.index, x.shape[0])
        if earlier is not None and forward.deciding is None:
            return earlier, None

        voters, earlier_ballot = forward.voters_of(x.shape[:2], level, x.device, x.dtype), None
        if store is not None and routing.decode == "running":
            earlier_ballot = store.ballots.get(site.index)
        k = routing.top_k
        excluded = site.local if routing.exclude_local else None
        p = probabilities(self._logits(site, x), excluded)
        ballot = poll(p, voters, k, routing.vote, excluded)
        # In training there is always something to learn from, if only with weight 0: every
        # parameter has a gradient.
        balanced = self.training and (self.balance_weight > 0 or routing.constant_weights)
        share = voters.picks(p, k, excluded) if balanced else None
        joint = self.joint if self.training else None
        if joint is not None:
            ballot, share = joint.join(ballot, share)
        own_mean = ballot.mean
        if earlier_ballot is not None:
            ballot = earlier_ballot + ballot
        route = decide(ballot, k, routing.estimator)
        balance, size = None, p.shape[-1]
        if share is not None:
            if routing.balance_f == "choice":
                share = shares_of(route, size, p.dtype, voters.deciding())
            balance = voters.balance(own_mean, share, size - int(routing.exclude_local))
        if store is not None and routing.decode == "running":
            store.ballots[site.index] = ballot
        decision = Decision(level, route, ballot, None, p, forward.valid)
        self._show(site, decision, p.shape[:2], earlier)
        if self.reroute is not None:
            route = self.reroute(site, route)
        route = self._take(site, route, earlier)
        if store is not None and routing.decode == "frozen":
            store.routes[site.index] = route.detach()
        return route, balance

    def _logits(self, site: Site, x: Tensor) -> Tensor:
        """What the site's gate makes of x (B, T, d): (B, T, N)."""
        gate = cast(Gate, self.gates[site.pool])
        prepared = self.current.prepared.get(site.pool) if self.current.shared else None
        return gate.logits(gate.features(x), *(gate.prepare() if prepared is None else prepared))

    def _level(self) -> Level:
        """Who decides: a batch does so in training alone."""
        level = self.routing.level
        return "sample" if level == "batch" and not self.training else level
