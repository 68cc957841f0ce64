"""Losses in chunks equal those of all logits at once, and no logits outlive them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from moc_cli.nn.token_loss import summed_loss, token_log_probs
from moc_cli.planning.live_memory import LiveMemory, PhasePart

WIDTH, WORDS = 8, 50


def states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(23, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(WORDS, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


PLACES = torch.tensor([0, 3, 4, 9, 10, 11, 17, 22])
TARGETS = torch.tensor([7, 0, 49, 3, 3, 12, 44, 1])


@pytest.mark.parametrize("rows", [1, 3, 8, 100])
def test_loss_and_gradient_are_those_of_all_logits(rows: int) -> None:
    """Also under a cap, which is no linear function, and with a gradient that is not 1."""
    head = weight(torch.float64)
    one, other = (states(torch.float64).requires_grad_() for _ in range(2))

    def logits(hidden: Tensor) -> Tensor:
        return torch.tanh(hidden @ head.T / 3) * 3

    found = summed_loss(one, PLACES, TARGETS, logits, rows=rows, divisor=5)
    expected = F.cross_entropy(logits(other[PLACES]), TARGETS, reduction="sum") / 5
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    (found * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=1e-12)


def test_bfloat16_states_lose_no_more_than_with_all_logits() -> None:
    head, exact = weight(torch.bfloat16), states(torch.float64).bfloat16().double().requires_grad_()
    F.cross_entropy(exact[PLACES] @ head.double().T, TARGETS).backward()

    def error(loss: Tensor, hidden: Tensor) -> float:
        loss.backward()
        assert hidden.grad is not None
        assert exact.grad is not None
        return (hidden.grad.double() - exact.grad).norm().item()

    one, other = (states(torch.bfloat16).requires_grad_() for _ in range(2))
    found = summed_loss(one, PLACES, TARGETS, lambda h: h @ head.T, rows=3, divisor=8)
    assert found.dtype == torch.float32
    whole = F.cross_entropy((other[PLACES] @ head.T).float(), TARGETS)
    assert error(found, one) <= 1.1 * error(whole, other)


def test_log_probabilities_are_those_of_all_logits() -> None:
    tokens = torch.stack([TARGETS, TARGETS.flip(0)], dim=1)
    logits = states()[PLACES] @ weight().T
    tokens[2] = logits.argmax(-1)[2]
    for rows in (1, 3, 100):
        found, likeliest = token_log_probs(
            states(), PLACES, tokens, lambda h: h @ weight().T, rows=rows
        )
        torch.testing.assert_close(found, logits.log_softmax(-1).gather(1, tokens))
        assert torch.equal(likeliest, logits.argmax(-1, keepdim=True) == tokens)
        assert likeliest[2].all()


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation gives."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.size = max(self.size, result.numel())
        return result


def test_no_tensor_holds_more_than_the_logits_of_a_chunk() -> None:
    hidden, head = states().requires_grad_(), weight()
    with Largest() as largest:
        summed_loss(hidden, PLACES, TARGETS, lambda h: h @ head.T, rows=2).backward()
        token_log_probs(hidden, PLACES, TARGETS[:, None], lambda h: h @ head.T, rows=2)
    assert largest.size == max(WIDTH * WORDS, 23 * WIDTH, 2 * WORDS)


def test_two_tensors_of_logits_live_at_a_time() -> None:
    """The logits and their log-probabilities, which become the gradient in place."""
    states = torch.randn(8, 4, requires_grad=True)
    head = nn.Linear(4, 4096, bias=False).requires_grad_(False)
    with LiveMemory("cpu", lambda: PhasePart("all", "all")) as memory:
        summed_loss(states, torch.arange(8), torch.arange(8), head, rows=8)
    assert memory.peak - head.weight.nbytes < 2.2 * 8 * 4096 * 4
