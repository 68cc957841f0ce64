"""Parts of a base's layers with backward passes that keep less than autograd keeps, and run fewer
kernels. The forward passes compute the same numbers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PART = 2**23  # elements of a gated block that its backward pass takes at a time, about
Activation = Callable[[Tensor], Tensor]


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        active = activation(gate)
        return active * up if active is gate else active.mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients take the places of `gate` and `up`, some rows at a time: these are the
        largest tensors of a layer.
        """
        gate, up = (saved.contiguous() for saved in ctx.saved_tensors)
        count = -(-gate.numel() // PART)
        parts = [t.reshape(-1, t.shape[-1]).chunk(count) for t in (gate, up, grad)]
        for some_gate, some_up, some_grad in zip(*parts, strict=True):
            with torch.enable_grad():
                leaf = some_gate.detach().requires_grad_()
                active = ctx.activation(leaf)
            (grad_gate,) = torch.autograd.grad(active, leaf, some_grad * some_up)
            torch.mul(active.detach(), some_grad, out=some_up)
            some_gate.copy_(grad_gate)
        return gate, up, None


def gated_product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """activation(gate) * up, of one shape; what the activation gives is made again, not kept.

    The backward pass, which runs once, writes into `gate` and `up`: they are not to be read again.
    """
    result: Tensor = _GatedProduct.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32)
        factor = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, factor)
        return weight * (wide * factor).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight, factor = ctx.saved_tensors
        wide = x.to(torch.float32)
        inner = (grad * weight).to(torch.float32)
        along = (inner * wide).mean(-1, keepdim=True) * factor.square()
        return torch.addcmul(inner, wide, along, value=-1).mul_(factor).to(x.dtype), None, None


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """w · x / sqrt(mean(x²) + epsilon) for x (..., d) and a frozen weight (d,); in float32 inside.

    Keeps x as it is, which others keep too, and no copy of it in float32.
    """
    result: Tensor = _RMSNorm.apply(x, weight, epsilon)  # type: ignore[no-untyped-call]
    return result
