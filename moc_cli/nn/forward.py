"""One forward of a model, as the sites in it see it, and what a generation remembers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moc_cli.nn.autograd import Coefficient
from moc_cli.nn.control import ControlPool, StackedControls
from moc_cli.nn.packed import PackedRows
from moc_cli.nn.vote import Ballot, Level, Route, Voters


@dataclass
class RouteStore:
    """What one generation remembers between its forwards: a route (frozen) or ballot per site.

    `stacks` hold the routes' controls once they are used for one token at a time; `dtypes` are the
    types of the sites' products. `waiting` (B,) marks the rows of which only padding has been seen,
    None where there are none. Once `settled`, every later forward uses what is here, whatever its
    mask. Without a gate there are no routes.
    """

    gated: bool = True
    settled: bool = False
    routes: dict[int, Route] = field(default_factory=dict)
    ballots: dict[int, Ballot] = field(default_factory=dict)
    stacks: dict[int, StackedControls] = field(default_factory=dict)
    dtypes: dict[int, torch.dtype] = field(default_factory=dict)
    waiting: Tensor | None = None
    _host: dict[int, Route] = field(default_factory=dict, repr=False)

    def on_host(self, index: int) -> Route | None:
        """A site's route in the memory of the host: those of all sites are read at once."""
        if self.routes and not self._host:
            ids = torch.stack([route.ids for route in self.routes.values()]).cpu()
            weights = torch.stack([route.weights for route in self.routes.values()]).cpu()
            self._host = {
                site: Route(ids[number], weights[number]) for number, site in enumerate(self.routes)
            }
        return self._host.get(index)

    def settle(self) -> None:
        """Called after each forward that fills the cache."""
        decided = bool(self.routes) and not self.ballots
        self.settled = self.waiting is None and (decided or not self.gated)

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do to the rows what the cache does to its own: reorder, select or repeat them."""
        self._host = {}
        self.routes = {site: route.rows(change) for site, route in self.routes.items()}
        self.ballots = {site: ballot.rows(change) for site, ballot in self.ballots.items()}
        self.stacks = {site: stack.rows(change) for site, stack in self.stacks.items()}
        if self.waiting is not None:
            self.waiting = change(self.waiting)

    def crop(self, tokens_to_remove: int) -> None:
        """Called where the cache takes tokens back; RuntimeError where they have voted already."""
        if self.ballots and tokens_to_remove:
            raise RuntimeError(
                "with decode 'running' the tokens that are taken back have voted already; guessed "
                "tokens go with decode 'frozen'"
            )


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

    `packed` are the rows that lie end to end in the one row of the blocks' inputs, where each of
    them decides for itself; `valid` and `shape` are then theirs.

    `loss_scale` is what the model's own loss was multiplied by, known when its backward begins.

    `pools`, `prepared` and `voters` are what all sites of a forward share. They are kept where
    `shape` is known, as it is in a forward of a model, and made again for each site elsewhere.
    """

    valid: Tensor | None = None
    store: RouteStore | None = None
    deciding: Tensor | None = None
    shape: tuple[int, int] | None = None
    past: int = 0
    copies: int = 1
    repeat: bool = False
    ended: bool = False
    packed: PackedRows | None = None
    loss_scale: float | Tensor = 1.0
    pools: dict[torch.dtype, ControlPool] = field(default_factory=dict, repr=False)
    prepared: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, repr=False)
    voters: Voters | None = field(default=None, repr=False)
    reentrant: bool = False
    _has_shape: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._has_shape = self.shape is not None  # by itself, so that no graph depends on the shape

    @property
    def shared(self) -> bool:
        """Whether its sites may use what others made.

        Not with reentrant activation checkpointing: it runs a layer without gradients first, and
        then with gradients by itself.
        """
        return self._has_shape and not (self.reentrant and torch.is_grad_enabled())

    def voters_of(
        self, shape: Sequence[int], level: Level, device: torch.device, dtype: torch.dtype
    ) -> Voters:
        """The tokens that vote, for blocks' inputs (B, T, d) in a type.

        Raises RuntimeError for a mask of another shape than (B, T).
        """
        if self.voters is not None:
            return self.voters
        if self.valid is not None and self.valid.shape != shape:
            raise RuntimeError(
                f"the mask of the voting tokens is {tuple(self.valid.shape)}, "
                f"the block's input {tuple(shape)}"
            )
        wide = torch.promote_types(dtype, torch.float32)
        voters = Voters.of(shape, self.valid, level, device, wide)
        if self.shape is not None:
            self.voters = voters
        return voters

    def end(self) -> None:
        """Called after the forward; its backward pass may still recompute parts of it.

        What they need is kept without its graph, which would keep the recomputed parts alive.
        """
        self.ended = True
        self.prepared = {
            pool: tuple(value.detach().requires_grad_(value.requires_grad) for value in values)
            for pool, values in self.prepared.items()
        }
        for pool in self.pools.values():
            pool.close()

    def scaled(self, weight: float, scale: float | None) -> Coefficient:
        """`weight` times `scale`, or where that is None, times that of the model's own loss."""
        return lambda: weight * (self.loss_scale if scale is None else scale)
