"""One low-rank control, and how a site's local and routed controls become one update."""

import math

import torch
from torch import Tensor, nn

from moc_cli.nn.gate import Route


class Control(nn.Module):
    """g(x) = scale · B A x, with A (r, d) kaiming-uniform(a=√5) and B (d, r) zero.

    Learned: A and B, in float32; they are cast to x's type for the product. No bias, no dropout
    (Parallel Control, arXiv 2505.17966; the plain `scale` instead of alpha/r follows its code).
    """

    def __init__(
        self, width: int, rank: int, generator: torch.Generator | None = None, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, width, dtype=torch.float32, device=device))
        self.B = nn.Parameter(torch.empty(width, rank, dtype=torch.float32, device=device))
        if device != "meta":
            self.reset(generator)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the start values."""
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5), generator=generator)
        nn.init.zeros_(self.B)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """x (..., d) -> (..., d) in x's type."""
        return (x @ self.A.to(x.dtype).T) @ (scale * self.B).to(x.dtype).T


def mixed_update(
    x: Tensor, local: Control, pool: list[Control], route: Route, alpha: float, scale: float
) -> Tensor:
    """α·g_t(x) + (1−α)·Σ_k π_k·g_k(x), the added part of eq. 9; x (B, T, d) -> (B, T, d).

    `route` holds one decision for the whole batch, one a row, or one a token.
    """
    if route.voters == 1:
        return _update_by_batch(x, local, pool, route, alpha, scale)
    update = local(x, scale * alpha)
    return update + _routed_by_group(x, pool, route, (1 - alpha) * scale)


def _update_by_batch(
    x: Tensor, local: Control, pool: list[Control], route: Route, alpha: float, scale: float
) -> Tensor:
    """One decision for all rows: local and routed controls form one pair of rank r·(K+1)."""
    chosen = [pool[k] for k in route.picks()[0]]
    A = torch.cat([local.A, *(control.A for control in chosen)]).to(x.dtype)  # (r(K+1), d)
    B = torch.cat([local.B, *(control.B for control in chosen)], dim=1)  # (d, r(K+1))
    weights = torch.cat([route.weights.new_full((1,), alpha), (1 - alpha) * route.weights[0]])
    weights = weights.repeat_interleave(local.A.shape[0])  # (r(K+1),): all controls have rank r
    return (x @ A.T) @ (B * (scale * weights).to(B.dtype)).to(x.dtype).T


def _routed_by_group(x: Tensor, pool: list[Control], route: Route, scale: float) -> Tensor:
    """Σ_k π_k·g_k with a decision per row or per token: each control runs on its own voters."""
    width = x.shape[-1]
    groups = x.reshape(route.voters, -1, width)  # (V, S, d): S = T by row, 1 by token
    routed = torch.zeros_like(groups)
    for k, voters, slots in route.groups():
        weight = (scale * route.weights[voters, slots]).to(x.dtype)  # (V_k,)
        part = pool[k](groups[voters]) * weight[:, None, None]
        routed = routed.index_add(0, voters, part)
    return routed.reshape(x.shape)
