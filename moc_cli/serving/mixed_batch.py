"""One batch whose rows use different control sets: each set decides and acts on its own rows.

While a prompt is read, every set sees its rows alone, as if they were the batch. Afterwards, a
token at a time, the controls of all sets in use are stacked into one pair of products a site.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moc_cli.errors import MocError
from moc_cli.nn.mixture import Mixture, Pass, RouteStore, Site
from moc_cli.nn.stacked import Bank, members, stack


@dataclass(eq=False)
class ControlSet:
    """One tenant's controls and gates. Generations that began with it keep it to their end."""

    name: str
    mixture: Mixture

    def __post_init__(self) -> None:
        self._sites = {(site.layer, site.block): site for site in self.mixture.sites}

    def __deepcopy__(self, memo: dict[int, Any]) -> "ControlSet":
        return self  # a copied cache continues with the same controls

    def site(self, place: "Place") -> Site | None:
        """Its site at a place; None where it has none, as with attention controls alone."""
        return self._sites.get((place.layer, place.block))

    @property
    def bytes(self) -> int:
        """The memory of its controls and gates."""
        return sum(p.numel() * p.element_size() for p in self.mixture.parameters())


@dataclass
class Group:
    """The rows (V,) of a batch that use one set, and what their generation remembers."""

    member: ControlSet
    rows: Tensor
    store: RouteStore | None


@dataclass
class CrowdStore:
    """What a generation of a mixed batch remembers; see `RouteStore`."""

    assigned: tuple[ControlSet | None, ...]
    waiting: Tensor | None = None
    settled: bool = False
    groups: list[Group] | None = None
    banks: dict[tuple[int, str], Bank | None] = field(default_factory=dict)
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
            return  # bare rows alone: there is nothing to follow, nor to hold against their number
        device = self.groups[0].rows.device
        old = change(torch.arange(self.size, device=device))  # where each new row comes from
        kept = []
        for group in self.groups:
            place = torch.full((self.size,), -1, device=device)
            place[group.rows] = torch.arange(len(group.rows), device=device)
            found = place[old]
            rows = (found >= 0).nonzero()[:, 0]
            if len(rows):
                chosen = found[rows]
                if group.store is not None:
                    group.store.rows(lambda values, chosen=chosen: values[chosen])
                kept.append(Group(group.member, rows, group.store))
        self.groups, self.size = kept, len(old)
        if not kept:
            self.banks.clear()
        self.banks = {
            place: None if bank is None else bank.rows(change) for place, bank in self.banks.items()
        }


@dataclass(eq=False)
class Place:
    """A block of the model where sets may have a control; its hooks read and write there."""

    crowd: "Crowd"
    layer: int
    block: str
    _state: Tensor | None = None

    def read(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook where the block's input x_t is seen."""
        self._state = args[0] if args else kwargs["hidden_states"]

    def write(self, module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        """Forward hook where the block's output is known: adds the sets' updates to it."""
        state, self._state = self._state, None
        assert state is not None
        update = self.crowd.update(self, state)
        if update is None:
            return output
        if isinstance(output, tuple):
            return (output[0] + update, *output[1:])
        return output + update


class Crowd:
    """Every forward's rows and the sets they use. Evaluation only: nothing is trained here."""

    training = False

    def __init__(self) -> None:
        self.assigned: tuple[ControlSet | None, ...] = ()
        self._current = Pass()
        self._groups: list[Group] | None = None
        self._passes: list[Pass] = []

    @property
    def current(self) -> Pass:
        """The running forward."""
        return self._current

    @current.setter
    def current(self, value: Pass) -> None:
        self._current, self._groups = value, None

    def new_store(self) -> CrowdStore:
        """Begin a generation with the sets that the rows use now."""
        return CrowdStore(self.assigned)

    def update(self, place: Place, x: Tensor) -> Tensor | None:
        """What the sets add at a place for x (B, T, d); None where none of them has a control."""
        if x.ndim == 2 and self._current.shape is not None:  # (B·T, d)
            update = self.update(place, x.unflatten(0, self._current.shape))
            return None if update is None else update.flatten(0, 1)
        store: Any = self._current.store
        if store is not None and store.settled and x.shape[1] == 1:
            key = (place.layer, place.block)
            if key not in store.banks:
                store.banks[key] = self._stack(store, place, x)
            bank = store.banks[key]
            return None if bank is None else bank.update(x)
        return self._by_group(place, x)

    def _by_group(self, place: Place, x: Tensor) -> Tensor | None:
        if self._groups is None:
            self._divide(x)
        assert self._groups is not None
        update = None
        for group, own in zip(self._groups, self._passes, strict=True):
            site = group.member.site(place)
            if site is None:
                continue
            mixture = group.member.mixture
            mixture.current = own
            everyone = len(group.rows) == x.shape[0]
            part = mixture.update(site, x if everyone else x[group.rows])
            if everyone:
                return part
            update = torch.zeros_like(x) if update is None else update
            update.index_copy_(0, group.rows, part)
        return update

    def _divide(self, x: Tensor) -> None:
        """Find the groups of this forward's rows, and each one's part of the pass."""
        store: Any = self._current.store
        if store is None:
            self._groups = _group(self.assigned, x, self._current.copies, stored=False)
        elif store.groups is None:
            store.groups = _group(store.assigned, x, self._current.copies, stored=True)
            store.size = x.shape[0]
        if store is not None:
            if store.groups and store.size != x.shape[0]:
                raise MocError(
                    f"the cache belongs to {store.size} rows, but the input has {x.shape[0]}"
                )
            self._groups = store.groups
        self._passes = [_part(self._current, group) for group in self._groups or ()]

    @torch.compiler.disable  # reads the routes from the device, once a generation
    def _stack(self, store: CrowdStore, place: Place, x: Tensor) -> Bank | None:
        """One bank of all sets: a row's weights are 0 for the controls of other sets."""
        if store.groups and x.shape[0] != store.size:
            raise MocError(
                f"the cache belongs to {store.size} rows, but the input has {x.shape[0]}"
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        controls, columns = [], []
        for group in store.groups or ():
            site, mixture = group.member.site(place), group.member.mixture
            if site is None:
                continue
            route = group.store.routes.get(site.index) if group.store is not None else None
            pool = mixture.pools[site.pool]
            order, weights = members(site.index, pool, route, mixture.routing.alpha)
            column = torch.zeros(x.shape[0], len(order), dtype=wide, device=x.device)
            column[group.rows] = mixture.scale * (1.0 if weights is None else weights.to(wide))
            columns.append(column)
            controls += [mixture.control(index) for index in order]
        if not controls:
            return None
        return stack(controls, torch.cat(columns, dim=1), x.dtype)


def _group(
    assigned: Sequence[ControlSet | None], x: Tensor, copies: int, *, stored: bool
) -> list[Group]:
    """The rows of each set; a name stands for all copies of its row, as beams are."""
    if not assigned:
        return []
    if len(assigned) * copies != x.shape[0]:
        raise MocError(
            f"the batch has {x.shape[0] // copies} rows, but control sets were named for "
            f"{len(assigned)}",
            "name one control set, or None, for every row",
        )
    spread = [member for member in assigned for _ in range(copies)]
    found = []
    for member in dict.fromkeys(spread):
        if member is None:
            continue
        rows = [row for row, other in enumerate(spread) if other is member]
        gated = member.mixture.routing.top_k > 0
        store = RouteStore(gated=gated) if stored else None
        found.append(Group(member, torch.tensor(rows, device=x.device), store))
    return found


def _part(current: Pass, group: Group) -> Pass:
    """A pass as the rows of one group see it."""
    valid = None if current.valid is None else current.valid[group.rows]
    late = None if current.late is None else current.late[group.rows]
    if late is not None and not bool(late.any()):
        late = None
    shape = None if current.shape is None else (len(group.rows), current.shape[1])
    return Pass(valid, group.store, late, shape, current.past, current.copies)
