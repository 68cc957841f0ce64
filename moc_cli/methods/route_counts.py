"""A record of what the gates do: running sums of fixed size.

    with adapted.recorder() as recorder:
        ...                      # forwards, generations, training steps
    record = recorder.record()   # of all processes that work together

Each decision counts once: not what a backward pass recomputes, not padding, not a generation's
later tokens that keep its route (with `decode: running` they decide, and count), and of the beams
of a prompt the first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from moc_cli import processes
from moc_cli.nn.base import MixtureBase
from moc_cli.nn.vote import Level
from moc_cli.nn.watch import Decision, new_decisions, one_token_decides


@dataclass(frozen=True)
class Layout:
    """The sites in their order, and the pools that their gates choose from, all of one size."""

    names: tuple[str, ...]
    pool_of: tuple[str, ...]
    pools: dict[str, list[int]]
    top_k: int

    @classmethod
    def of(cls, mixture: MixtureBase) -> Self:
        """The layout of a mixture."""
        return cls(
            tuple(site.name for site in mixture.sites),
            tuple(site.pool for site in mixture.sites),
            {pool: list(members) for pool, members in mixture.pools.items()},
            mixture.top_k,
        )

    def members(self, site: int) -> list[int]:
        """The sites whose controls this site chooses from."""
        return self.pools[self.pool_of[site]]

    @property
    def size(self) -> int:
        """N, the number of controls in each pool."""
        return len(next(iter(self.pools.values())))


@dataclass
class Sums:
    """Sums over the decisions of T sites with N controls each, in float64.

    (T, N): how often each control of the pool was chosen, the weights that it got, its mean
    probability. (T,): the entropy of the mean probability (nats), the lead of the chosen controls
    over the rest, the decisions turned by one token; and the measured rows with their sum of
    ‖update‖ / ‖block's output‖.
    """

    counts: Tensor
    weights: Tensor
    probabilities: Tensor
    entropy: Tensor
    margin: Tensor
    one_token: Tensor
    rows: Tensor
    relative_size: Tensor

    @classmethod
    def zeros(cls, sites: int, size: int, device: torch.device | str = "cpu") -> "Sums":
        """Nothing seen yet."""
        shapes = [(sites, size)] * 3 + [(sites,)] * (len(fields(cls)) - 3)
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    @property
    def arrays(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def copy_(self, other: "Sums") -> None:
        """Take the values of others over."""
        for array, value in zip(self.arrays, other.arrays, strict=True):
            array.copy_(value)


@dataclass
class Record:
    """The sums over the decisions of each site, on the CPU; records of the same sites add up."""

    layout: Layout
    sums: Sums

    def __add__(self, other: "Record") -> "Record":
        if self.layout != other.layout:
            raise ValueError("records of different sites cannot be added")
        pairs = zip(self.sums.arrays, other.sums.arrays, strict=True)
        return Record(self.layout, Sums(*(a + b for a, b in pairs)))

    @property
    def empty(self) -> bool:
        """Whether nothing was decided."""
        return not bool(self.sums.counts.any())

    def decisions(self, site: int) -> float:
        """How often the site decided; each decision chooses `top_k` controls."""
        return self.sums.counts[site].sum().item() / self.layout.top_k

    def table(self, pool: str) -> Tensor:
        """Counts of one pool, (its sites, its controls)."""
        return self.sums.counts[self.layout.pools[pool]]

    def choices(self) -> list[list[int]] | None:
        """Every site's counts as whole numbers; None where nothing was decided."""
        if self.empty:
            return None
        choices: list[list[int]] = self.sums.counts.long().tolist()
        return choices

    def use(self) -> dict[str, Any]:
        """Each control's share of its pool's choices, in the sites' order, and the local share."""
        use, local, total = [0.0] * len(self.layout.names), 0.0, 0.0
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


class Recorder:
    """Adds up what a mixture decides while it is entered; nothing else of a forward changes.

    `detailed` sums all that a Record holds, otherwise the choices alone. A training does not enter
    it: `count` adds the choices of all sites at once after a forward, which costs next to nothing
    and leaves nothing to do in compiled layers.
    """

    def __init__(self, mixture: MixtureBase, device: torch.device, *, detailed: bool) -> None:
        self._mixture = mixture
        self._layout = layout = Layout.of(mixture)
        self._detailed = detailed
        self._sums = Sums.zeros(len(layout.names), layout.size, device)
        self._marked = Sums.zeros(len(layout.names), layout.size, device)
        self._new_rows: Tensor | None = None  # (B,) of the decision just taken; None: all rows

    def __enter__(self) -> Self:
        self._mixture.watchers.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._mixture.watchers.remove(self)

    def record(self, *, reset: bool = False) -> Record:
        """What was seen so far, in all processes where several work together; joint."""
        joint = Sums(*(values.clone() for values in self._sums.arrays))
        group = processes.current()
        if group.world > 1:
            flat = torch.cat([values.flatten() for values in joint.arrays])
            group.sum(flat)
            parts = torch.split(flat, [values.numel() for values in joint.arrays])
            pairs = zip(parts, joint.arrays, strict=True)
            joint = Sums(*(part.view_as(values) for part, values in pairs))
        if reset:
            for values in self._sums.arrays:
                values.zero_()
        return Record(self._layout, Sums(*(values.cpu() for values in joint.arrays)))

    def mark(self) -> None:
        """Remember the sums, for `rewind`."""
        self._marked.copy_(self._sums)

    def rewind(self) -> None:
        """Forget what was seen since `mark`."""
        self._sums.copy_(self._marked)

    def resume(self, choices: Sequence[Sequence[int]]) -> None:
        """Go on from the choices of an earlier record, (sites, N); of several processes one does.

        A record gathers those of all processes, so that all together must not begin with more.
        """
        if not processes.current().main:
            return
        self._sums.counts.copy_(self._sums.counts.new_tensor(choices))

    def decided(self, site: Any, decision: Decision) -> None:
        """Add one forward's decisions of a site; they stay on the device."""
        if processes.current().counts:
            self._add(site.index, decision)

    @torch.no_grad()
    def _add(self, site: int, decision: Decision) -> None:
        ids, is_new, counts = decision.route.ids, decision.is_new, self._sums.counts[site]
        k = ids.shape[1]
        mark = counts.new_ones(len(ids)) if is_new is None else is_new.to(counts.dtype)  # (V,)
        counts.index_add_(0, ids.flatten(), mark if k == 1 else mark.repeat_interleave(k))
        if not self._detailed:
            return
        self._new_rows = mark if decision.level == "sample" else None
        sums = self._sums
        mean = decision.ballot.mean.to(mark.dtype)  # (V, N)
        weights = decision.route.weights.to(mark.dtype) * mark[:, None]
        sums.weights[site].index_add_(0, ids.flatten(), weights.flatten())
        sums.probabilities[site] += mark @ mean
        sums.entropy[site] += (mark * -torch.special.xlogy(mean, mean).sum(dim=1)).sum()
        chosen = mean.gather(1, ids).amin(dim=1)
        runner_up = mean.scatter(1, ids, 0.0).amax(dim=1)
        sums.margin[site] += (mark * (chosen - runner_up)).sum()
        turned = one_token_decides(decision)
        if turned is not None:
            sums.one_token[site] += (mark * turned).sum()

    def count(self) -> None:
        """Add the choices of the training forward that has just ended, as the sites hold them.

        A site that did not decide holds none; as a rule all did, and are counted together.
        """
        sites = self._mixture.sites
        choices = [(site.index, site.choice) for site in sites if site.choice is not None]
        together = len(choices) == len(sites)
        for group in [choices] if together else [[choice] for choice in choices]:
            ids = torch.stack([choice for _, choice in group])  # (sites, V, K)
            counts = self._sums.counts[group[0][0] :][: len(group)]
            marks = self._new(ids.shape[1]).to(counts.dtype)[:, None].expand(ids.shape)
            counts.scatter_add_(1, ids.flatten(1), marks.flatten(1))

    def _new(self, decisions: int) -> Tensor:
        """Mark the decisions (V,) of a training forward that count."""
        valid, is_new = self._mixture.current.valid, None
        if valid is not None:
            level: Level = "token" if decisions == valid.numel() else "sample"
            is_new = new_decisions(valid.shape, valid, None, level, 1) if decisions > 1 else None
        return self._sums.counts.new_ones(decisions) if is_new is None else is_new

    @torch.no_grad()
    def added(self, site: Any, output: Tensor, update: Tensor) -> None:
        """Add the size of what a site adds beside its block's own output, by row.

        Only where the site has just decided; tokens that do not vote are left out.
        """
        if site.choice is None or not self._detailed or not processes.current().counts:
            return
        current = self._mixture.current
        if update.ndim == 2 and current.shape is not None:
            output, update = (t.reshape(*current.shape, -1) for t in (output, update))
        mark = update.new_ones(update.shape[:2]) if current.valid is None else current.valid
        mark = mark.to(torch.float64)
        output_norms, update_norms = (
            (t.to(torch.float64).square().sum(dim=-1) * mark).sum(dim=1).sqrt()
            for t in (output, update)
        )
        rows = mark.amax(dim=1) if self._new_rows is None else self._new_rows
        self._sums.rows[site.index] += rows.sum()
        ratio = rows * update_norms / output_norms.clamp(min=torch.finfo(output_norms.dtype).tiny)
        self._sums.relative_size[site.index] += ratio.sum()
