"""One batch whose rows use different control sets: each set decides and acts on its own rows.

While a prompt is read, every set sees its rows alone, as if they were the batch. Afterwards, a
token at a time, the controls of all sets in use are stacked into one pair of products a site.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moc_cli.errors import MocError
from moc_cli.nn.control import Control, StackedControls, WeightedControls
from moc_cli.nn.forward import Forward, RouteStore
from moc_cli.nn.mixture import Mixture
from moc_cli.nn.site import Site

Block = tuple[int, str]  # a layer's number, and "attn" or "ffn"


@dataclass(eq=False)
class ControlSet:
    """One tenant's controls and gates. Generations that began with it keep it to their end."""

    name: str
    mixture: Mixture

    def __post_init__(self) -> None:
        self._sites = {(site.layer, site.block): site for site in self.mixture.sites}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ControlSet":
        return self  # a copied cache continues with the same controls

    def site(self, block: Block) -> Site | None:
        """Its site at a block; None where it has none, as with attention controls alone."""
        return self._sites.get(block)

    @property
    def bytes(self) -> int:
        """The memory of its controls and gates."""
        return sum(p.numel() * p.element_size() for p in self.mixture.parameters())


@dataclass
class RowGroup:
    """The rows (V,) of a batch that use one set, and what their generation remembers."""

    controls: ControlSet
    rows: Tensor
    store: RouteStore | None


@dataclass
class MixedStore:
    """What a generation of a mixed batch remembers; see `RouteStore`."""

    assigned: tuple[ControlSet | None, ...]
    waiting: Tensor | None = None
    settled: bool = False
    groups: list[RowGroup] | None = None
    stacks: dict[Block, StackedControls | None] = field(default_factory=dict)
    size: int = 0

    def settle(self) -> None:
        """Called after each forward that fills the cache."""
        self.settled = self.waiting is None and self.groups is not None
        if not self.settled:
            return  # a group's store knows nothing of rows that wait
        for group in self.groups or ():
            if group.store is not None:
                group.store.settle()

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Do to the rows what the cache does to its own."""
        if self.waiting is not None:
            self.waiting = change(self.waiting)
        if not self.groups:
            return  # rows of the bare base alone, of which any number is right
        device = self.groups[0].rows.device
        sources = change(torch.arange(self.size, device=device))  # where each new row comes from
        remaining = []
        for group in self.groups:
            place_of = torch.full((self.size,), -1, device=device)
            place_of[group.rows] = torch.arange(len(group.rows), device=device)
            places = place_of[sources]
            rows = (places >= 0).nonzero()[:, 0]
            if len(rows):
                chosen = places[rows]
                if group.store is not None:
                    group.store.rows(partial(torch.index_select, dim=0, index=chosen))
                remaining.append(RowGroup(group.controls, rows, group.store))
        self.groups, self.size = remaining, len(sources)
        if not remaining:
            self.stacks.clear()
        self.stacks = {
            block: None if stack is None else stack.rows(change)
            for block, stack in self.stacks.items()
        }


class MixedBatch:
    """The rows of every forward and the sets they use. Evaluation only: nothing is trained here."""

    training = False

    def __init__(self) -> None:
        self.assigned: tuple[ControlSet | None, ...] = ()
        self._current = Forward()
        self._groups: list[RowGroup] | None = None
        self._forwards: list[Forward] = []

    @property
    def current(self) -> Forward:
        """The running forward."""
        return self._current

    @current.setter
    def current(self, value: Forward) -> None:
        self._current, self._groups = value, None

    def new_store(self) -> MixedStore:
        """Begin a generation with the sets that the rows use now."""
        return MixedStore(self.assigned)

    def add(self, block: Block, x: Tensor, output: Tensor) -> Tensor:
        """A block's output (B, T, d) with the rows' updates for the block's input x added to it."""
        if x.ndim == 2 and self._current.shape is not None:  # (B·T, d)
            shape = self._current.shape
            return self.add(block, x.reshape(*shape, -1), output.reshape(*shape, -1)).flatten(0, 1)
        store: Any = self._current.store
        if store is not None and store.settled and x.shape[1] == 1:
            if block not in store.stacks:
                self._fill(store, block, x)
            stack = store.stacks[block]
            update = None if stack is None else stack.update(x)
        else:
            update = self._by_group(block, x)
        return output if update is None else output + update

    def _by_group(self, block: Block, x: Tensor) -> Tensor | None:
        """What each set adds to its own rows; None where none of them has a control."""
        if self._groups is None:
            self._divide(x)
        assert self._groups is not None
        update = None
        for group, forward in zip(self._groups, self._forwards, strict=True):
            site, mixture = group.controls.site(block), group.controls.mixture
            if site is None:
                continue
            mixture.current = forward
            if len(group.rows) == x.shape[0]:
                return mixture.update(site, x)
            update = torch.zeros_like(x) if update is None else update
            update.index_copy_(0, group.rows, mixture.update(site, x[group.rows]))
        return update

    def _divide(self, x: Tensor) -> None:
        """Find the groups of this forward's rows, and the forward as each of them sees it."""
        store: Any = self._current.store
        if store is None:
            self._groups = _group(self.assigned, x, self._current.copies, stored=False)
        elif store.groups is None:
            store.groups = _group(store.assigned, x, self._current.copies, stored=True)
            store.size = x.shape[0]
        if store is not None:
            _check_size(store, x)
            self._groups = store.groups
        self._forwards = [_part(self._current, group) for group in self._groups or ()]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch has no type for it
    def _fill(self, store: MixedStore, block: Block, x: Tensor) -> None:
        """Stack the controls of all sets; reads the routes from the device, once a generation.

        A row's weights are 0 for the controls of other sets.
        """
        _check_size(store, x)
        controls: list[Control] = []
        columns = []
        for group in store.groups or ():
            site = group.controls.site(block)
            if site is None:
                continue
            route = group.store.routes.get(site.index) if group.store is not None else None
            part = group.controls.mixture.combine(site, route)
            column = part.weights.new_zeros(x.shape[0], len(part.controls))
            column[group.rows] = part.weights
            columns.append(column)
            controls += part.controls
        store.stacks[block] = None
        if controls:
            weighted = WeightedControls(controls, torch.cat(columns, dim=1))
            store.stacks[block] = weighted.stack(x.dtype)


def _check_size(store: MixedStore, x: Tensor) -> None:
    if store.groups and store.size != x.shape[0]:
        raise MocError(f"the cache belongs to {store.size} rows, but the input has {x.shape[0]}")


def _group(
    assigned: Sequence[ControlSet | None], x: Tensor, copies: int, *, stored: bool
) -> list[RowGroup]:
    """The rows of each set; a name stands for all copies of its row, as beams are."""
    if not assigned:
        return []
    if len(assigned) * copies != x.shape[0]:
        raise MocError(
            f"the batch has {x.shape[0] // copies} rows, but control sets were named for "
            f"{len(assigned)}",
            "name one control set, or None, for every row",
        )
    spread = [controls for controls in assigned for _ in range(copies)]
    groups = []
    for controls in dict.fromkeys(spread):
        if controls is None:
            continue
        rows = [row for row, assigned_set in enumerate(spread) if assigned_set is controls]
        store = controls.mixture.new_store() if stored else None
        groups.append(RowGroup(controls, torch.tensor(rows, device=x.device), store))
    return groups


def _part(current: Forward, group: RowGroup) -> Forward:
    """A forward as the rows of one group see it."""
    valid = None if current.valid is None else current.valid[group.rows]
    deciding = None if current.deciding is None else current.deciding[group.rows]
    if deciding is not None and not bool(deciding.any()):
        deciding = None
    shape = None if current.shape is None else (len(group.rows), current.shape[1])
    return Forward(valid, group.store, deciding, shape, current.past, current.copies)
