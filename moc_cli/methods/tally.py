"""Running counts of the decisions that the sites of a mixture take."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Chooser(Protocol):
    """A site with a gate: `choice` (V, K) holds the last forward's decision, None where none."""

    index: int
    pool: str
    choice: Tensor | None

    @property
    def name(self) -> str: ...


class Tally:
    """How often each site chose each member of its pool, K members a decision."""

    def __init__(self, sites: Sequence[Chooser], pools: dict[str, list[int]], top_k: int) -> None:
        self._sites = sites
        self._pools = pools
        self._top_k = top_k
        self._counts: dict[int, Tensor] = {}

    def add(self) -> None:
        """Add the decisions of the last forward; they stay on the device."""
        for site in self._sites:
            if site.choice is None:
                continue
            size = len(self._pools[site.pool])
            used = torch.bincount(site.choice.flatten(), minlength=size)
            known = self._counts.get(site.index)
            self._counts[site.index] = used if known is None else known + used

    def summary(self, reset: bool = False) -> dict[str, Any]:
        """Shares by pool and by site; {} where nothing was counted."""
        counts = {index: used.cpu() for index, used in self._counts.items()}
        if reset:
            self._counts = {}
        if not counts:
            return {}
        return {
            "pools": {
                pool: self._pool(members, torch.stack([counts[i] for i in members]).double())
                for pool, members in self._pools.items()
            }
        }

    def _pool(self, members: list[int], table: Tensor) -> dict[str, Any]:
        """One pool's shares, from its table of counts (sites, N)."""
        total = table.sum()
        use = (table.sum(0) / total).tolist()
        names = [self._sites[index].name for index in members]
        return {
            "controls": names,
            "use": use,
            "dead": [name for name, share in zip(names, use, strict=True) if share == 0],
            "local_share": (table.diagonal().sum() / total).item(),
            "decisions": int(total.item()) // self._top_k,
            "per_site": (table / table.sum(1, keepdim=True).clamp(min=1)).tolist(),
        }
