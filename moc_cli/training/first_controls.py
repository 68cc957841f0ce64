"""Where A begins, as the first training rows see it: `method.init` pca and gradient.

The rows go through the frozen model one at a time, without dropout: that takes less memory than a
step. In several processes the first one alone does it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moc_cli.kinds.loss import TaskLoss
from moc_cli.methods import Adapted
from moc_cli.nn.control import INPUT_NORMS
from moc_cli.nn.mixture import Mixture
from moc_cli.nn.site import Site
from moc_cli.processes import Processes
from moc_cli.recipe.methods import ControlMethod, MocMethod
from moc_cli.training.loop_types import Data

ROWS = 64
See = Callable[[Site, Tensor, Tensor], Tensor]  # a site, what its control reads, the block's output


def begin_controls(
    adapted: Adapted,
    method: MocMethod | ControlMethod,
    data: Data,
    device: torch.device,
    processes: Processes,
) -> int:
    """Set A of every control by `method.init`; return how many rows were looked at. Joint.

    The rows of A (r, d) become the r leading directions, orthonormal but for one factor by which A
    keeps its Frobenius norm. B stays 0, so that the model's output stays as it is.
    """
    mixture = adapted.mixture
    assert mixture is not None  # both methods have one
    rows = [row for batch in data.batches.epoch(0) for row in batch][:ROWS]
    batches = (data.collate([row]) for row in rows)
    loss = data.loss(adapted.model, device)
    adapted.model.eval()

    def find() -> list[Tensor]:
        sums = INITS[method.init](mixture, batches, loss)
        return [leading_directions(total, method.rank).float().cpu() for total in sums]

    with torch.no_grad():
        for site, directions in zip(mixture.sites, processes.on_main(find), strict=True):
            A = mixture.control(site.index).A
            A.copy_(directions * (A.norm() / directions.norm()).cpu())
    return len(rows)


def leading_directions(total: Tensor, count: int) -> Tensor:
    """The leading eigenvectors (count, d) of total (d, d); the largest part of each is above 0."""
    vectors: Tensor = torch.linalg.eigh(total).eigenvectors.t().flip(0)[:count]
    largest = vectors.abs().argmax(dim=1, keepdim=True)
    return vectors * vectors.gather(1, largest).sign()


def _of_states(
    mixture: Mixture, batches: Iterator[dict[str, Tensor]], loss: TaskLoss
) -> list[Tensor]:
    """Of each site Σ x xᵀ over the states x that its control reads."""
    sums = _zeros(mixture)

    def see(site: Site, x: Tensor, output: Tensor) -> Tensor:
        sums[site.index].addmm_(x.t(), x)
        return output

    with torch.no_grad(), _inputs_to(mixture, see):
        for batch in batches:
            loss(batch, 1)
    return sums


def _of_gradients(
    mixture: Mixture, batches: Iterator[dict[str, Tensor]], loss: TaskLoss
) -> list[Tensor]:
    """Of each site MᵀM, where M = Σ g xᵀ is the loss's gradient of a full matrix in its place.

    g is the gradient of the block's output. The first step then moves B along M Aᵀ, in the leading
    left directions of M.
    """
    sums = _zeros(mixture)
    site_calls: list[tuple[Site, Tensor, Tensor]] = []

    def see(site: Site, x: Tensor, output: Tensor) -> Tensor:
        if not output.requires_grad:  # nothing before it is trained
            output = output.detach().requires_grad_() + 0
        site_calls.append((site, x, output))
        return output

    with torch.enable_grad(), _inputs_to(mixture, see):
        for batch in batches:
            site_calls.clear()
            value = loss(batch, 1)
            grads = torch.autograd.grad(value, [output for _, _, output in site_calls])
            for (site, x, _), grad in zip(site_calls, grads, strict=True):
                sums[site.index].addmm_(grad.reshape(x.shape).to(x).t(), x)
    return [total.t() @ total for total in sums]


INITS = {"pca": _of_states, "gradient": _of_gradients}


def _zeros(mixture: Mixture) -> list[Tensor]:
    A = mixture.control(0).A
    size = A.shape[1]
    return [A.new_zeros(size, size, dtype=torch.float64) for _ in mixture.sites]


@contextmanager
def _inputs_to(mixture: Mixture, see: See) -> Iterator[None]:
    """Within it `see` gets what every control reads, (tokens, d) in float64, instead of it."""
    norm = INPUT_NORMS[mixture.routing.input_norm]

    def add(site: Site, x: Tensor, output: Tensor) -> Tensor:
        normed = norm(x.detach()).double()
        return see(site, normed.reshape(-1, normed.shape[-1]), output)

    vars(mixture)["add"] = add
    try:
        yield
    finally:
        del vars(mixture)["add"]
