"""What several processes send each other in a step, and the listed rates of what carries it."""

from dataclasses import dataclass

FLOAT = 4  # bytes of a number in the buffer of gradients


@dataclass(frozen=True)
class Link:
    """What connects two cards or two machines: bytes a second in each direction, as listed, and
    the seconds before the first byte of a joint call arrives, which are assumed.
    """

    name: str
    bandwidth: float
    start: float


# Within a machine: NVLink of an H100, and PCIe 4.0 with 16 lanes. Between machines: networks.
LINKS = (
    Link("NVLink", 450e9, 20e-6),
    Link("PCIe 4", 32e9, 20e-6),
    Link("network 400 Gbit/s", 50e9, 50e-6),
    Link("network 200 Gbit/s", 25e9, 50e-6),
    Link("network 100 Gbit/s", 12.5e9, 50e-6),
    Link("network 10 Gbit/s", 1.25e9, 50e-6),
)
REACHED = 0.75  # share of the listed rate that joint calls reach: assumed, not measured


@dataclass(frozen=True)
class Traffic:
    """What one process sends in a step: bytes, in so many joint calls."""

    sent: int
    calls: int

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(self.sent + other.sent, self.calls + other.calls)

    def times(self, count: int) -> "Traffic":
        """The same, `count` times."""
        return Traffic(self.sent * count, self.calls * count)

    def seconds(self, link: Link) -> float:
        """How long it takes, if nothing is computed meanwhile."""
        return self.calls * link.start + self.sent / (link.bandwidth * REACHED)


def all_reduce(size: int, processes: int) -> Traffic:
    """What each of a ring of processes sends to sum `size` bytes: its parts, then the sums."""
    return Traffic(round(2 * (processes - 1) / processes * size), 1)


def all_gather(size: int, processes: int) -> Traffic:
    """What each of a ring of processes sends until all have the `size` bytes of all."""
    return Traffic(round((processes - 1) / processes * size), 1)
