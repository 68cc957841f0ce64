"""The controls that the rows of one generation use at one site, stacked for one token at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from moc_cli.nn.control import Control
from moc_cli.nn.gate import Route


@dataclass
class Bank:
    """update = B (w ∘ A x), over R: the ranks of every control in use, one after another.

    `A` (R, d) and `B` (d, R) are in the type of x. `weights` (V, R), in float32 or wider, hold α,
    (1−α)·π and the scale, 0 where a row does not use a control; None: they are the same for every
    row and multiplied into `B`. All are copies: a step of training in mid-generation shows from the
    next generation on.
    """

    A: Tensor
    B: Tensor
    weights: Tensor | None

    def update(self, x: Tensor) -> Tensor:
        """x (V, T, d) -> what its site adds, the same shape and type."""
        hidden = linear(x, self.A)
        if self.weights is not None:
            hidden = (hidden * self.weights[:, None]).to(x.dtype)
        return linear(hidden, self.B)

    def rows(self, change: Callable[[Tensor], Tensor]) -> "Bank":
        """The bank with its rows reordered, selected or repeated by `change`."""
        if self.weights is None:
            return self
        return Bank(self.A, self.B, change(self.weights))


def stack(controls: Sequence[Control], weights: Tensor, dtype: torch.dtype) -> Bank:
    """Stack controls with weights (V, controls); equal rows of weights are folded into B."""
    A = torch.cat([control.A for control in controls]).to(dtype)
    B = torch.cat([control.B for control in controls], dim=1)
    ranks = torch.tensor([control.A.shape[0] for control in controls], device=weights.device)
    spread = weights.repeat_interleave(ranks, dim=1)  # (V, R)
    if bool((spread == spread[:1]).all()):
        return Bank(A, (spread[0] * B).to(dtype), None)
    return Bank(A, B.to(dtype), spread)


def members(
    local: int, pool: Sequence[int], route: Route | None, alpha: float
) -> tuple[list[int], Tensor | None]:
    """Return the controls in use at a site, its own first, and their weights (V, controls).

    `pool` gives the control of each of the route's ids. Without a route the weight is 1.
    """
    if route is None:
        return [local], None
    used = sorted({pool[k] for row in route.picks() for k in row} - {local})
    order = [local, *used]
    place = torch.zeros(len(pool), dtype=torch.long)
    for slot, control in enumerate(pool):
        if control in order:
            place[slot] = order.index(control)
    slots = place.to(route.ids.device)[route.ids]  # (V, K)
    weights = route.weights.new_zeros(route.voters, len(order))
    weights[:, 0] = alpha
    return order, weights.scatter_add(1, slots, (1 - alpha) * route.weights)
