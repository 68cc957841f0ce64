"""A place in the model where a control is added."""

from dataclasses import dataclass

from torch import Tensor

from moc_cli.nn.vote import BalanceLoss


@dataclass(eq=False)
class Site:
    """One place in the model where a control is added: its layer, its block, its pool.

    `local` is its own place in its pool. `place` (1, 1) is its index on the device, and `members`
    (N,) are those of its pool: as tensors, so that one compiled graph serves all layers. `choice`
    and `balance` are slots: overwritten by each forward, never appended to, and detached.
    """

    index: int
    layer: int
    block: str
    pool: str
    local: int
    place: Tensor | None = None
    members: Tensor | None = None
    choice: Tensor | None = None
    balance: BalanceLoss | None = None

    @property
    def loss(self) -> Tensor | None:
        """The balance loss of the last forward in training; None where it has no weight."""
        return None if self.balance is None else self.balance.value()

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.block}"
