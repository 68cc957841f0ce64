"""Low-rank controls, and the one place where eq. 9's α, 1−α, π and scale are put together.

Shapes: V decisions (1 for a batch, B for rows, B·T for tokens), C controls in use, r their rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moc_cli.nn.autograd import low_rank, stack
from moc_cli.nn.vote import Route


class Control(nn.Module):
    """g(x) = w · B A x, with A (r, d) kaiming-uniform(a=√5) and B (d, r) zero.

    Learned: A and B, in float32; they are cast to x's type for the product. No bias, no dropout
    (Parallel Control, arXiv 2505.17966; the plain weight instead of alpha/r follows its code).
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

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """x (V, S, d) and weights (V,), None for 1 -> (V, S, d) in x's type."""
        hidden = F.linear(x, self.A.to(x.dtype))
        if weight is not None:
            hidden = (hidden * weight[:, None, None]).to(x.dtype)
        return F.linear(hidden, self.B.to(x.dtype))


class ControlPool:
    """All N controls of a mixture for one forward, in the type of its products.

    What a site uses is chosen on the device. In training every control gets a gradient, zero where
    no site used it. `routed` is how many controls a route names.
    """

    def __init__(
        self,
        controls: Sequence[Control],
        dtype: torch.dtype,
        alpha: float,
        scale: float,
        routed: int,
    ) -> None:
        self._rows, self._sums = stack([(control.A, control.B) for control in controls], dtype)
        self._open = True
        self._alpha, self._scale = alpha, scale
        self._sources = [matrix for control in controls for matrix in (control.A, control.B)]
        self._versions = [matrix._version for matrix in self._sources]
        self._alone = None if scale == 1 else self._sums.new_full((1, 1), scale)
        self._of_equals = weigh(self._sums.new_ones(1, routed), alpha, scale)

    def outdated(self) -> bool:
        """Whether a control was changed since: a site called outside any forward would see that."""
        return self._versions != [matrix._version for matrix in self._sources]

    def update(
        self,
        x: Tensor,
        local: Tensor,
        ids: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Tensor:
        """x (B, T, d) -> the added part of eq. 9, the same shape and type.

        `local` (1, 1) and `ids` (V, K) name the local and the routed controls among all, `shares`
        (V, K) are π, None for 1; V is 1 or B. Without `ids` the local control acts alone.
        """
        index, weights = local, self._alone
        if ids is not None:
            index = torch.cat([index.expand(len(ids), 1), ids], dim=1)
            if shares is not None:
                weights = weigh(shares, self._alpha, self._scale)
            else:
                weights = self._of_equals.expand(len(ids), -1)
        groups = x.reshape(len(index), -1, x.shape[-1])  # (V, S, d)
        update, sums = low_rank(groups, index, weights, self._rows, self._sums)
        if (torch.compiler.is_compiling() or self._open) and sums.requires_grad:
            self._sums = sums
        return update.view(x.shape)

    def close(self) -> None:
        """End the forward: a recomputation may follow, and its graph must not be kept here.

        A compiled layer runs this after a recomputation too.
        """
        self._sums = self._sums.detach().requires_grad_(self._sums.requires_grad)
        self._open = False


@dataclass
class StackedControls:
    """update = B (w ∘ A x), over R: the ranks of every control in use, one after another.

    `A` (R, d) and `B` (d, R) are in the type of x. `weights` (V, R), in float32 or wider, are 0
    where a row does not use a control; None: they are the same for every row and multiplied into
    `B`. In memory B lies as its transpose: a product with few rows reads that several times faster.
    All are copies: a step of training between two forwards of a generation does not show.
    """

    A: Tensor
    B: Tensor
    weights: Tensor | None

    def update(self, x: Tensor) -> Tensor:
        """x (V, S, d) -> what its site adds, the same shape and type."""
        hidden = F.linear(x, self.A)
        if self.weights is not None:
            hidden = (hidden * self.weights[:, None]).to(x.dtype)
        return F.linear(hidden, self.B)

    def rows(self, change: Callable[[Tensor], Tensor]) -> "StackedControls":
        """The same with its rows reordered, selected or repeated by `change`."""
        if self.weights is None:
            return self
        return StackedControls(self.A, self.B, change(self.weights))


@dataclass
class WeightedControls:
    """Σ_c w_vc · g_c(x_v): the controls in use at a site, with weights (V, C)."""

    controls: Sequence[Control]
    weights: Tensor

    def update(self, x: Tensor) -> Tensor:
        """x (B, T, d) -> the same shape and type; each control runs on those that use it."""
        groups = x.reshape(len(self.weights), -1, x.shape[-1])  # (V, S, d)
        update = torch.zeros_like(groups)
        for control, weight in zip(self.controls, self.weights.unbind(1), strict=True):
            users = weight.detach().nonzero()[:, 0]
            if len(users) == len(groups):
                update = update + control(groups, weight)
            else:
                update = update.index_add(0, users, control(groups[users], weight[users]))
        return update.reshape(x.shape)

    def stack(self, dtype: torch.dtype, count: int | None = None) -> StackedControls:
        """All as one pair in `dtype`; weights that are equal for every row are folded into B.

        With `count` there are as many, those beyond the controls zero, and several rows have
        weights of their own: the shapes say nothing about which controls they use.
        """
        A = torch.cat([control.A for control in self.controls]).to(dtype)
        pairs = list(zip(self.controls, self.weights.unbind(1), strict=True))
        is_uniform = count is None and bool((self.weights == self.weights[:1]).all())
        if len(self.weights) == 1 or is_uniform:
            rows = torch.cat([weight[0] * control.B.t() for control, weight in pairs])
            return StackedControls(A, rows.to(dtype).t(), None)
        rows = torch.cat([control.B.t() for control in self.controls])
        spread = [weight[:, None].expand(-1, len(control.A)) for control, weight in pairs]
        weights = torch.cat(spread, dim=1).to(A.device)  # (V, R)
        if count is not None:
            padding = (count - len(self.controls)) * (len(A) // len(self.controls))
            A, rows = (F.pad(matrix, (0, 0, 0, padding)) for matrix in (A, rows))
            weights = F.pad(weights, (0, padding))
        return StackedControls(A, rows.to(dtype).t(), weights)


def combine(
    local: Control,
    member: Callable[[int], Control],
    route: Route | None,
    alpha: float,
    scale: float,
) -> WeightedControls:
    """scale · (α·g_t + (1−α)·Σ_k π_k·g_k), the added part of eq. 9; without a route scale · g_t.

    `member` gives the control of each of the route's ids.
    """
    if route is None:
        return WeightedControls([local], local.A.new_full((1, 1), scale))
    if route.voters == 1:
        used, shares = route.picks()[0], route.weights  # (V, used)
    else:
        used = sorted({k for picks in route.picks() for k in picks})
        columns = torch.tensor(used, device=route.ids.device)
        shares = ((route.ids[..., None] == columns) * route.weights[..., None]).sum(dim=1)
    return WeightedControls([local, *map(member, used)], weigh(shares, alpha, scale))


def weigh(shares: Tensor, alpha: float, scale: float) -> Tensor:
    """scale · (α, (1−α)·π) (V, 1 + K): the weights of eq. 9; shares π (V, K)."""
    return F.pad(scale * (1 - alpha) * shares, (1, 0), value=scale * alpha)
