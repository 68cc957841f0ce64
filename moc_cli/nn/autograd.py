"""Functions with a backward pass of their own, where autograd would keep or copy too much."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Coefficient = Callable[[], float | Tensor]
HALF = (torch.bfloat16, torch.float16)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the type of products under autocast; None outside of it."""
    kind = device.type
    # Only `meta` has no autocast; torch.amp.is_autocast_available breaks a graph before torch 2.12.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, value: Tensor, slope: Tensor, coefficient: Coefficient
    ) -> Tensor:
        # Not saved for the backward pass: a layer that is recomputed ends at the last of these.
        ctx.slope, ctx.coefficient = slope, coefficient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        coefficient = ctx.coefficient()
        if isinstance(coefficient, Tensor):
            coefficient = coefficient.to(ctx.slope)
        return grad, ctx.slope * coefficient, None, None


def inject(
    x: Tensor, value: Tensor, coefficient: Coefficient, slope: Tensor | None = None
) -> Tensor:
    """Identity on x whose backward also sends `coefficient()` times `slope` into `value`.

    The slope is without a graph and of value's shape; None: ones. It makes a loss with this slope
    part of the objective without a module holding a tensor that carries a graph, which would keep a
    recomputed layer alive under activation checkpointing.
    """
    slope = torch.ones_like(value) if slope is None else slope
    result: Tensor = _Inject.apply(x, value, slope.detach(), coefficient)  # type: ignore[no-untyped-call]
    return result


class _Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, keys: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(features, dim=-1, keepdim=True).clamp(min=1e-12)
        ctx.save_for_backward(features, keys, length)
        logits: Tensor = F.linear(features, keys) / length
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        features, keys, length = ctx.saved_tensors
        along = grad / length
        turned = along @ keys
        stretch = (turned * features).sum(dim=-1, keepdim=True) / length.square()
        grad_keys = along.flatten(0, -2).t() @ features.flatten(0, -2)
        return torch.addcmul(turned, features, stretch, value=-1), grad_keys


def cosine(features: Tensor, keys: Tensor) -> Tensor:
    """|e_k| cos(f, e_k) of features f (..., p) and keys e (N, p): (..., N); 0 where f is 0.

    The length of f is divided out last, of N < p numbers. Kept for the backward pass: the features
    and their lengths. Second derivatives raise RuntimeError.
    """
    result: Tensor = _Cosine.apply(features, keys)  # type: ignore[no-untyped-call]
    return result


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dtype = x.dtype if x.dtype in HALF else weight.dtype
        along = grad.to(dtype)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = (along @ weight.to(dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = along.flatten(0, -2).t() @ x.flatten(0, -2).to(dtype)
            grad_weight = rows.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.flatten(0, -2).sum(dim=0)
        return grad_x, grad_weight, grad_bias


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """W x (+ b) in the type of W (p, d) for x (..., d), which is kept as it is.

    In half precision, x's gradients come from products of that type, as those of a control do, so
    that the backward pass makes no wide copy of the states. Second derivatives raise RuntimeError.
    """
    result: Tensor = _Project.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


class _Stack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, count: int, *matrices: Tensor
    ) -> tuple[Tensor, Tensor]:
        first, second = matrices[:count], matrices[count:]
        stacked = torch.stack([*first, *(matrix.t() for matrix in second)])
        stacked = stacked.view(2, count, *first[0].shape)
        ctx.set_materialize_grads(False)
        rows = stacked.to(dtype)
        ctx.mark_non_differentiable(rows)
        return rows, _empty_sums(stacked)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, sums: Tensor | None) -> tuple[Tensor | None, ...]:
        if sums is None:
            return (None,) * len(ctx.needs_input_grad)
        return None, None, *sums[0].unbind(), *(matrix.t() for matrix in sums[1].unbind())


class _LowRankProducts(torch.autograd.Function):
    """The products of chosen pairs; its backward adds to the running sums of their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor | None, sums: Tensor, rows: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        A, B = _chosen_rows(rows, index)
        hidden = torch.bmm(x, A.transpose(1, 2))  # (V, S, C·r)
        weighed = _weigh(hidden, weights)
        if not ctx.needs_input_grad[1]:
            hidden = weighed
        ctx.save_for_backward(x, weights, hidden, rows, index)
        ctx.dtype = sums.dtype
        ctx.set_materialize_grads(False)
        return torch.bmm(weighed, B), _empty_sums(sums)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, sums: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        if grad is None:
            return None, None, sums, None, None
        x, weights, hidden, rows, index = ctx.saved_tensors
        A, B = _chosen_rows(rows, index)
        grad_scaled = torch.bmm(grad, B.transpose(1, 2))
        grad_hidden = _weigh(grad_scaled, weights)
        grad_weights, weighed = None, hidden
        if ctx.needs_input_grad[1]:
            parts = (grad_scaled * hidden).to(weights.dtype)
            grad_weights = parts.unflatten(-1, (index.shape[1], -1)).sum(dim=(1, 3))
            weighed = _weigh(hidden, weights)
        if ctx.needs_input_grad[2]:
            grad_A = torch.bmm(grad_hidden.transpose(1, 2), x)  # (V, C·r, d)
            grad_B = torch.bmm(weighed.transpose(1, 2), grad)
            if sums is None:
                sums = rows.new_zeros(rows.shape, dtype=ctx.dtype)
            sums = _add_chosen(sums, torch.stack([grad_A, grad_B]), index)
        grad_x = torch.bmm(grad_hidden, A) if ctx.needs_input_grad[0] else None
        return grad_x, grad_weights, sums, None, None


def stack(matrices: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """N pairs A (r, d), B (d, r) as one tensor (2, N, r, d) in `dtype`, and its running sums.

    The rows have no gradient. `low_rank` hands the running sums on from one use of the rows to the
    next, and the backward pass adds the gradients of all uses to one tensor, which then reaches
    every matrix. A gather of each use would make a tensor of that size for each use.
    """
    first, second = zip(*matrices, strict=True)
    rows: tuple[Tensor, Tensor] = _Stack.apply(dtype, len(first), *first, *second)  # type: ignore[no-untyped-call]
    return rows


def low_rank(
    x: Tensor, index: Tensor, weights: Tensor | None, rows: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor]:
    """Σ_c w_vc · B_c A_c x_v for x (V, S, d) in the type of `rows`, and the next running sums.

    `index` (V, C) names the pairs among `rows` (2, N, r, d), `weights` (V, C) weigh them; None: 1.
    Nothing is read from the device. Kept for the backward pass: x, and A x (weighed, where the
    weights want no gradient). Second derivatives raise RuntimeError.
    """
    result: tuple[Tensor, Tensor] = _LowRankProducts.apply(x, weights, sums, rows, index)  # type: ignore[no-untyped-call]
    return result


def _chosen_rows(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen A and Bᵀ, (V, C·r, d) each."""
    voters, chosen = index.shape
    selected = rows.index_select(1, index.flatten())  # (2, V·C, r, d)
    A, B = selected.view(2, voters, chosen * rows.shape[2], rows.shape[3])
    return A, B


def _weigh(hidden: Tensor, weights: Tensor | None) -> Tensor:
    """hidden (V, S, C·r) times weights (V, C), in the type of `hidden`."""
    if weights is None:
        return hidden
    parts: Tensor = hidden.unflatten(-1, (weights.shape[1], -1))
    return (parts * weights[:, None, :, None]).flatten(-2).to(hidden.dtype)


def _empty_sums(grads: Tensor) -> Tensor:
    """Something to hang the gradient's running sums on: all zeros, in the memory of one."""
    return grads.new_zeros(()).expand(grads.shape)


def _add_chosen(sums: Tensor, grads: Tensor, index: Tensor) -> Tensor:
    """Add the gradients (2, V, C·r, d) of the chosen pairs to `sums` (2, N, r, d), in place.

    In an order that does not change between runs, also on a GPU. A compiler is given the same out
    of place, and makes it in place itself.
    """
    parts = grads.to(sums.dtype).unflatten(2, (index.shape[1], -1))  # (2, V, C, r, d)
    in_place = not torch.compiler.is_compiling()
    if len(index) == 1:
        for c in range(index.shape[1]):
            add = sums.index_add_ if in_place else sums.index_add
            sums = add(1, index[0, c : c + 1], parts[:, 0, c : c + 1])
        return sums
    by_pair = parts.flatten(1, 2).transpose(0, 1)  # (V·C, 2, r, d)
    pairs, places = sums.transpose(0, 1), (index.flatten(),)
    index_put = pairs.index_put_ if in_place else pairs.index_put
    return index_put(places, by_pair, accumulate=True).transpose(0, 1)
