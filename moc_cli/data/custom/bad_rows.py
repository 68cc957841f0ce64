"""What is wrong with rows, gathered over all files before any of it is told."""

from moc_cli.data.examples import Place
from moc_cli.data.source import numbered
from moc_cli.errors import DataError

LISTED = 20  # kinds of bad rows that a message names; the others are counted


class Complaints:
    """Bad rows with the reason of each; rows of one file with one reason share a sentence."""

    def __init__(self) -> None:
        self._bad: dict[tuple[str, str, str], list[int]] = {}

    def __bool__(self) -> bool:
        return bool(self._bad)

    def add(self, place: Place, why: str) -> None:
        """Note a bad row."""
        name, unit, number = place
        self._bad.setdefault((name, unit, why), []).append(number)

    def tell(self) -> None:
        """Raise DataError naming every bad row that was noted, if there are any."""
        if not self._bad:
            return
        lines = [
            f"{name}, {numbered(sorted(numbers), unit)}: {why}"
            for (name, unit, why), numbers in list(self._bad.items())[:LISTED]
        ]
        rest = list(self._bad.values())[LISTED:]
        if rest:
            lines.append(f"... and {sum(map(len, rest)):,} more bad rows")
        raise DataError("\n".join(lines))
