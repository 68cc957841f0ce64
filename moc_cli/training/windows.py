"""The micro-batches of a window as tensors, made ahead while the device works."""

from collections.abc import Callable

from torch import Tensor

MicroBatches = list[list[int]]  # of each micro-batch, its row numbers
Batches = list[dict[str, Tensor]]


class Windows:
    """Collates windows; with `pin` into memory that a GPU copies from without a wait.

    A window that was made `ahead` is only handed out. What comes out is the same either way.
    """

    def __init__(self, collate: Callable[[list[int]], dict[str, Tensor]], *, pin: bool) -> None:
        self._collate = collate
        self._pin = pin
        self._ahead: tuple[MicroBatches, Batches] = ([], [])

    def take(self, rows: MicroBatches) -> Batches:
        """Return the micro-batches of these rows."""
        rows_ahead, batches = self._ahead
        return batches if rows_ahead == rows else self._make(rows)

    def ahead(self, rows: MicroBatches) -> None:
        """Make the micro-batches that will be taken next; none at the end of an epoch."""
        self._ahead = (rows, self._make(rows))

    def _make(self, rows: MicroBatches) -> Batches:
        batches = [self._collate(numbers) for numbers in rows]
        if not self._pin:
            return batches
        return [{n: tensor.pin_memory() for n, tensor in batch.items()} for batch in batches]
