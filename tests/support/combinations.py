"""Fewer combinations of options than all."""

from collections.abc import Sequence
from itertools import product
from typing import Any


def half_of_product(*options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return half of the combinations: those whose places in the options have an even sum.

    Options have two values or more: so any of them but one meet in all their combinations.
    """
    numbered = (enumerate(values) for values in options)
    return [
        tuple(value for _, value in combination)
        for combination in product(*numbered)
        if sum(number for number, _ in combination) % 2 == 0
    ]
