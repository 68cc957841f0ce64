"""A record of what the gates do: running sums, one slot of fixed size a site.

    with adapted.recorder() as recorder:
        ...                      # forwards, generations, training steps
    record = recorder.record()   # merged over the processes that train together

Counted is each decision once: not what a backward pass recomputes, not padding, not a generation's
later tokens that keep its route (with `decode: running` they decide, and count), and of the beams
of a prompt the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor, distributed

from moc_cli.nn.gate import Vote
from moc_cli.nn.watch import Decision, Watcher, one_token_decides

# What a slot holds after the pool's counts, weights and probabilities.
ENTROPY, MARGIN, ONE_TOKEN, ROWS, SIZE = range(5)


@dataclass(frozen=True)
class Layout:
    """The sites in their order, and the pools that their gates choose from."""

    names: tuple[str, ...]
    pool_of: tuple[str, ...]
    pools: dict[str, list[int]]
    top_k: int

    def members(self, site: int) -> list[int]:
        """The sites whose controls this site chooses from."""
        return self.pools[self.pool_of[site]]


@dataclass
class Record:
    """Sums over the decisions of each site, on the CPU in float64.

    `slots[t]` is (3N + 5,): how often each of the pool's N controls was chosen, the weights that it
    got, its mean probability; then the entropy of the mean probability (nats), the lead of the
    chosen over the rest, the decisions turned by one token, and the rows with their sum of
    ‖update‖ / ‖block's output‖. Records of the same sites add up.
    """

    layout: Layout
    slots: list[Tensor]

    def __add__(self, other: "Record") -> "Record":
        if self.layout != other.layout:
            raise ValueError("records of different sites cannot be added")
        slots = [a + b for a, b in zip(self.slots, other.slots, strict=True)]
        return Record(self.layout, slots)

    @property
    def empty(self) -> bool:
        """Whether nothing was decided."""
        return not any(bool(self.counts(t).any()) for t in range(len(self.slots)))

    def counts(self, site: int) -> Tensor:
        """How often the site chose each member of its pool, (N,)."""
        return self._part(site, 0)

    def weights(self, site: int) -> Tensor:
        """The sum of the weights that it gave them, (N,)."""
        return self._part(site, 1)

    def probabilities(self, site: int) -> Tensor:
        """The sum over decisions of their mean probabilities, (N,)."""
        return self._part(site, 2)

    def decisions(self, site: int) -> float:
        """How often the site decided; each decision chooses `top_k` controls."""
        return self.counts(site).sum().item() / self.layout.top_k

    def total(self, site: int, what: int) -> float:
        """One of the sums at the end of the slot."""
        return self.slots[site][3 * len(self.layout.members(site)) + what].item()

    def table(self, pool: str) -> Tensor:
        """Counts of one pool, (its sites, its controls)."""
        return torch.stack([self.counts(site) for site in self.layout.pools[pool]])

    def _part(self, site: int, number: int) -> Tensor:
        size = len(self.layout.members(site))
        return self.slots[site][number * size : (number + 1) * size]

    def choices(self) -> list[list[int]] | None:
        """Every site's counts as whole numbers; None where nothing was decided."""
        if self.empty:
            return None
        return [self.counts(site).long().tolist() for site in range(len(self.slots))]

    def use(self) -> dict[str, Any]:
        """Each control's share of its pool's choices, in the sites' order, and the local share."""
        use, local, total = [0.0] * len(self.slots), 0.0, 0.0
        for pool, members in self.layout.pools.items():
            table = self.table(pool)
            total, local = total + table.sum().item(), local + table.diagonal().sum().item()
            shares = table.sum(0) / table.sum().clamp(min=1)
            for site, share in zip(members, shares.tolist(), strict=True):
                use[site] = share
        return {"use": use, "local_share": local / max(total, 1)}

    def summary(self) -> dict[str, Any]:
        """Shares by pool and by site; {} where nothing was decided."""
        if self.empty:
            return {}
        return {"pools": {pool: self._pool(pool) for pool in self.layout.pools}}

    def _pool(self, pool: str) -> dict[str, Any]:
        table = self.table(pool)
        total = table.sum()
        use = (table.sum(0) / total).tolist()
        names = [self.layout.names[site] for site in self.layout.pools[pool]]
        return {
            "controls": names,
            "use": use,
            "dead": [name for name, share in zip(names, use, strict=True) if share == 0],
            "local_share": (table.diagonal().sum() / total).item(),
            "decisions": int(total.item()) // self.layout.top_k,
            "per_site": (table / table.sum(1, keepdim=True).clamp(min=1)).tolist(),
        }


class Watched(Protocol):
    """A mixture that lets watchers see its decisions."""

    training: bool
    watchers: list[Watcher]


class Recorder:
    """Adds up what a mixture decides while it is entered; nothing else of a forward changes.

    `detailed` sums all that a Record holds, otherwise the choices alone, which costs a training
    step next to nothing. `training` counts only forwards in that mode; None: all.
    """

    def __init__(
        self,
        mixture: Watched,
        layout: Layout,
        device: torch.device,
        *,
        vote: Vote = "mean",
        detailed: bool = True,
        training: bool | None = None,
    ) -> None:
        self._mixture = mixture
        self._layout = layout
        self._vote: Vote = vote
        self.measures = detailed
        self._training = training
        self._sizes = [3 * len(layout.members(site)) + 5 for site in range(len(layout.names))]
        self._sums = torch.zeros(sum(self._sizes), dtype=torch.float64, device=device)
        self._slots = self._sums.split(self._sizes)
        self._marked = self._sums.clone()
        starts = [sum(self._sizes[:site]) for site in range(len(self._sizes))]
        self._starts = torch.tensor(starts, device=device)[:, None, None]
        self._pending: list[Tensor] = []  # choices (V, K) of the first sites of a forward
        self._rows: Tensor | None = None  # of the decision just taken: which rows it counts

    def __enter__(self) -> Self:
        self._mixture.watchers.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._mixture.watchers.remove(self)

    def record(self, *, reset: bool = False) -> Record:
        """What was seen so far, of all processes where several train together."""
        self._flush()
        joint = self._sums.clone()
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(joint)
        if reset:
            self._sums.zero_()
        return Record(self._layout, list(joint.cpu().split(self._sizes)))

    def mark(self) -> None:
        """Remember the sums, for `rewind`."""
        self._flush()
        self._marked.copy_(self._sums)

    def rewind(self) -> None:
        """Forget what was seen since `mark`."""
        self._pending.clear()
        self._sums.copy_(self._marked)

    def resume(self, choices: Sequence[Sequence[int]]) -> None:
        """Go on from the choices of an earlier record, (sites, N); of several processes one does.

        A record gathers those of all processes, so that all together must not begin with more.
        """
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
            return
        for slot, counts in zip(self._slots, choices, strict=True):
            slot[: len(counts)] = slot.new_tensor(counts)

    def decided(self, site: Any, decision: Decision) -> None:
        """Add one forward's decisions of a site; they stay on the device."""
        if self._training is not None and self._mixture.training != self._training:
            return
        if self.measures or decision.counted is not None:
            self._add(site, decision)
        else:
            self._queue(site.index, decision.route.ids)

    @torch.no_grad()
    def _add(self, site: Any, decision: Decision) -> None:
        ids, counted = decision.route.ids, decision.counted
        slot, k = self._slots[site.index], ids.shape[1]
        mark = slot.new_ones(len(ids)) if counted is None else counted.to(slot.dtype)  # (V,)
        slot.index_add_(0, ids.flatten(), mark if k == 1 else mark.repeat_interleave(k))
        if self.measures:
            self._add_details(slot, decision, mark)
            self._rows = mark if decision.level == "sample" else None

    def _queue(self, site: int, ids: Tensor) -> None:
        """Count choices of which all count: those of all sites of a forward in one go."""
        if site != len(self._pending):
            self._flush()
        if site == len(self._pending):
            self._pending.append(ids)
        else:
            slot = self._slots[site]
            slot.index_add_(0, ids.flatten(), slot.new_ones(ids.numel()))
        if len(self._pending) == len(self._slots):
            self._flush()

    def _flush(self) -> None:
        """Add the choices that wait."""
        if self._pending:
            ids = torch.stack(self._pending) + self._starts[: len(self._pending)]  # (S, V, K)
            self._sums.index_add_(0, ids.flatten(), self._sums.new_ones(ids.numel()))
            self._pending.clear()

    def _add_details(self, slot: Tensor, decision: Decision, mark: Tensor) -> None:
        """Add weights, probabilities and what follows from them, of decisions with mark 1."""
        mean = decision.ballot.mean.to(slot.dtype)  # (V, N)
        size, k = mean.shape[1], decision.route.ids.shape[1]
        ids, weights = decision.route.ids, decision.route.weights.to(slot.dtype)
        slot.index_add_(0, size + ids.flatten(), (weights * mark[:, None]).flatten())
        slot[2 * size : 3 * size] += mark @ mean
        end = slot[3 * size :]
        end[ENTROPY] += (mark * -torch.special.xlogy(mean, mean).sum(dim=1)).sum()
        chosen = mean.gather(1, ids).amin(dim=1)
        rest = mean.scatter(1, ids, 0.0).amax(dim=1)
        end[MARGIN] += (mark * (chosen - rest)).sum()
        turned = one_token_decides(decision, k, self._vote)
        if turned is not None:
            end[ONE_TOKEN] += (mark * turned).sum()

    @torch.no_grad()
    def added(self, site: Any, output: Tensor, update: Tensor) -> None:
        """Add the size of what a site adds beside its block's own output, by row.

        Only where the site has just decided; tokens that do not vote are left out.
        """
        if site.choice is None:
            return
        if self._training is not None and self._mixture.training != self._training:
            return
        current = site.mixture.current
        if update.ndim == 2:
            output, update = (t.unflatten(0, current.shape) for t in (output, update))
        mark = update.new_ones(update.shape[:2]) if current.valid is None else current.valid
        mark = mark.to(torch.float64)
        own, more = (
            (t.to(torch.float64).square().sum(dim=-1) * mark).sum(dim=1).sqrt()
            for t in (output, update)
        )
        rows = mark.amax(dim=1) if self._rows is None else self._rows
        end = self._slots[site.index][3 * len(self._layout.members(site.index)) :]
        end[ROWS] += rows.sum()
        end[SIZE] += (rows * more / own.clamp(min=torch.finfo(own.dtype).tiny)).sum()


def layout_of(mixture: Any, top_k: int) -> Layout:
    """The layout of a mixture with sites and pools."""
    sites: Sequence[Any] = mixture.sites
    return Layout(
        tuple(site.name for site in sites),
        tuple(site.pool for site in sites),
        {pool: list(members) for pool, members in mixture.pools.items()},
        top_k,
    )
