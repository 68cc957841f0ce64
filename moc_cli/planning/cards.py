"""Cards and their listed rates: memory, operations and bytes a second."""

import re
from dataclasses import dataclass, replace
from itertools import pairwise

from moc_cli.errors import MocError
from moc_cli.recipe.suggest import choices


@dataclass(frozen=True)
class Card:
    """A card: bytes of memory; operations a second in half precision, in TF32 where the card has
    it, and in float32; bytes a second of its memory. Without rates only its size is known.
    """

    name: str
    memory: int
    half: float | None = None
    tf32: float | None = None
    single: float | None = None
    bandwidth: float | None = None


def _card(
    name: str, gb: float, half: float, tf32: float | None, single: float, bandwidth: float
) -> Card:
    """A card from GB, TFLOP/s and GB/s, as its maker lists them; dense, without sparsity."""
    wide = None if tf32 is None else tf32 * 1e12
    return Card(name, int(gb * 1e9), half * 1e12, wide, single * 1e12, bandwidth * 1e9)


# What CUDA offers of each card's memory.
CARDS = {
    card.name: card
    for card in (
        _card("T4", 15.6, 65, None, 8.1, 320),
        _card("V100-32GB", 34.1, 125, None, 15.7, 900),
        _card("RTX3090", 25.3, 71, 35.6, 35.6, 936),
        _card("RTX4090", 25.3, 165, 82.6, 82.6, 1008),
        _card("RTX5090", 33.7, 209, 104.8, 104.8, 1792),
        _card("L4", 23.6, 121, 60, 30.3, 300),
        _card("A10", 23.7, 125, 62.5, 31.2, 600),
        _card("A6000", 50.9, 155, 77.4, 38.7, 768),
        _card("L40S", 47.7, 362, 183, 91.6, 864),
        _card("A100-40GB", 42.4, 312, 156, 19.5, 1555),
        _card("A100-80GB", 85.1, 312, 156, 19.5, 2039),
        _card("H100-80GB", 85.0, 989, 494, 66.9, 3350),
        _card("H200-141GB", 150.1, 989, 494, 66.9, 4800),
    )
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(GB|GiB)", re.IGNORECASE)


def find_card(text: str) -> Card:
    """Return the card of a name, or one of a size such as 24GB whose rates are not known.

    Raises MocError for any other text.
    """
    size = _SIZE.fullmatch(text.strip())
    if size:
        memory = int(float(size[1]) * (2**30 if size[2].lower() == "gib" else 10**9))
        if memory == 0:
            raise MocError("--gpu: the memory must be above 0", "for example --gpu 24GB")
        return Card(text.strip(), memory)
    names = {_plain(name): card for name, card in CARDS.items()}
    if _plain(text) in names:
        return names[_plain(text)]
    longer = [name for name in CARDS if _plain(text) and _plain(name).startswith(_plain(text))]
    if longer:
        raise MocError(f"--gpu: '{text}' is not a whole name; it begins {', '.join(longer)}")
    raise MocError(
        f"--gpu: '{text}' is neither a size such as 24GB nor a known card{choices(text, CARDS)}"
    )


def card_of(name: str, memory: int) -> Card:
    """Return the card with a driver's name, such as NVIDIA H100 80GB HBM3, and its own memory."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    words += ["".join(pair) for pair in pairwise(words)]  # RTX 4090 is RTX4090 here
    candidates = [card for key, card in CARDS.items() if key.partition("-")[0].lower() in words]
    nearest = min(
        candidates, key=lambda card: abs(card.memory - memory), default=Card(name, memory)
    )
    return replace(nearest, name=name, memory=memory)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
