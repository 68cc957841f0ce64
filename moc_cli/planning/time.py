"""The time of counted work on a card, from its listed rates."""

from collections.abc import Mapping

from moc_cli.planning.cards import Card
from moc_cli.planning.fake_device import Work

# Shares of the listed rates that kernels of training reach, and seconds between two kernels:
# assumed, where nothing has been measured.
REACHED_OPERATIONS = 0.65
REACHED_BYTES = 0.75
LAUNCH = 5e-6


def seconds_of(work: Mapping[Work, int], card: Card, *, tf32: bool = False) -> float | None:
    """Return how long kernels take one after another; None where the card's rates are not known.

    Each takes as long as its operations or its bytes, whichever is more, or as its start. With
    `tf32` products of float32 are made in TF32, where the card has it.
    """
    if card.half is None or card.single is None or card.bandwidth is None:
        return None
    seconds = 0.0
    for kernel, count in work.items():
        single = card.tf32 if tf32 and card.tf32 is not None else card.single
        rate = card.half if kernel.half else single
        operations = kernel.flops / (rate * REACHED_OPERATIONS)
        moving = kernel.moved / (card.bandwidth * REACHED_BYTES)
        seconds += count * max(operations, moving, LAUNCH)
    return seconds
