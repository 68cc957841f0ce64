"""Losses and log-probabilities of single tokens, from logits that never exist all at once.

Shapes: M positions of width d, N of them with a target, V words of the vocabulary. A head makes
logits (n, V) of hidden states (n, d); it is called on `rows` positions at a time.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Logits = Callable[[Tensor], Tensor]


class _SummedLoss(torch.autograd.Function):
    """Computes the gradient of the hidden states beside the loss, so that no logits are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        places: Tensor,
        targets: Tensor,
        head: Logits,
        rows: int,
        divisor: float,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=states.device)
        gradient = torch.zeros_like(states) if ctx.needs_input_grad[0] else None
        for chunk, chunk_targets in zip(places.split(rows), targets.split(rows), strict=True):
            part = states.detach()[chunk].requires_grad_(gradient is not None)
            with torch.set_grad_enabled(gradient is not None):
                logits = head(part)
            log_probs = _log_softmax(logits.detach())
            total += F.nll_loss(log_probs, chunk_targets, reduction="sum") / divisor
            if gradient is not None:
                slope = _slope(log_probs, chunk_targets).to(logits.dtype)
                (of_states,) = torch.autograd.grad(logits, part, slope)
                gradient.index_copy_(0, chunk, of_states / divisor)
                del slope
            del logits, log_probs  # before the next chunk's
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # One element, not none: it is then multiplied in float32 whatever the states' type.
        return (gradient * grad.reshape(1)).to(gradient.dtype), None, None, None, None, None


def summed_loss(
    states: Tensor, places: Tensor, targets: Tensor, head: Logits, *, rows: int, divisor: float = 1
) -> Tensor:
    """Sum the cross-entropies of targets (N,) after the states (M, d) at `places` (N,), in float32.

    The sum is divided by `divisor`. Each place comes once. Only the states get gradients: the head
    has to be frozen.
    """
    total: Tensor = _SummedLoss.apply(  # type: ignore[no-untyped-call]
        states, places, targets, head, rows, divisor
    )
    return total


@torch.no_grad()
def token_log_probs(
    states: Tensor, places: Tensor, tokens: Tensor, head: Logits, *, rows: int
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of tokens (N, C), C after each of the states (M, d) at `places`
    (N,), in float32 (N, C); and whether each of them is the likeliest one (N, C).
    """
    chosen = torch.empty(tokens.shape, dtype=torch.float32, device=states.device)
    likeliest = torch.empty(tokens.shape, dtype=torch.bool, device=states.device)
    for first in range(0, len(places), rows):
        part = slice(first, first + rows)
        log_probs = _log_softmax(head(states[places[part]]))
        chosen[part] = log_probs.gather(-1, tokens[part])
        likeliest[part] = log_probs.argmax(-1, keepdim=True) == tokens[part]
        del log_probs
    return chosen, likeliest


def _slope(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The gradient of the summed loss for the logits (n, V): p, less 1 at each target; in place."""
    places, p = targets[:, None], log_probs.exp_()
    return p.scatter_(1, places, p.gather(1, places) - 1)


def _log_softmax(logits: Tensor) -> Tensor:
    return F.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
