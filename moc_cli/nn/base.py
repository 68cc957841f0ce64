"""What the mixture of controls and that of layers share: their forward, and who sees it decide."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from moc_cli.nn.forward import Forward
from moc_cli.nn.vote import Route
from moc_cli.nn.watch import Decision, Watcher, new_decisions


class MixtureBase(nn.Module):
    """Decides at each of its `sites` which `top_k` members of the site's pool are used.

    `current` is the running forward. A mixture that is not `active` adds nothing. `balance_weight`
    is λ of one site's balance loss.
    """

    sites: list[Any]
    pools: dict[str, list[int]]
    top_k: int
    balance_weight: float

    def __init__(self) -> None:
        super().__init__()
        self.active = True
        self.loss_scale: float | None = None  # None: that of the model's own loss
        self.current = Forward()
        self.watchers: list[Watcher] = []

    def balance(self) -> float | None:
        """λ·Σ_sites of the last training forward, read from the device; for logs."""
        losses = [site.loss for site in self.sites if site.loss is not None]
        return self.balance_weight * torch.stack(losses).sum().item() if losses else None

    def watching(self) -> Sequence[Watcher]:
        """Who sees what happens now: nobody in a recompute, or where a decision is repeated."""
        if not self.watchers or self.current.ended or self.current.repeat:
            return ()
        return self.watchers

    def _show(
        self, site: Any, decision: Decision, shape: Sequence[int], earlier: Route | None
    ) -> None:
        """Let watchers see a decision over (B, T) tokens; of rows with an earlier route those that
        decide now.
        """
        for watcher in self.watching():
            forward = self.current
            deciding = None if earlier is None else forward.deciding
            decision.is_new = new_decisions(
                shape, forward.valid, deciding, decision.level, forward.copies
            )
            watcher.decided(site, decision)

    def _take(self, site: Any, route: Route, earlier: Route | None) -> Route:
        """The route that a site uses: rows that decided earlier keep theirs."""
        site.choice, deciding = route.ids, self.current.deciding
        if earlier is None or deciding is None:
            return route
        site.choice = route.ids[deciding]
        return earlier.replaced(deciding, route)
