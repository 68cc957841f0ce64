"""Numbers as text: fractions, scores, bytes, times, counts; a dash stands for a missing value."""

import math

from moc_cli.results import is_fraction

MISSING = "–"


def decimal(value: float | None, digits: int) -> str:
    """Return a number with so many digits after the point."""
    return MISSING if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def hundredths(value: float | None, digits: int = 1) -> str:
    """Return a fraction in hundredths without a unit: 0.8312 as 83.1."""
    return decimal(None if value is None else 100 * value, digits)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction with its unit: 0.8312 as 83.1 %."""
    text = hundredths(value, digits)
    return text if text == MISSING else f"{text} %"


def score_text(metric: str, value: float | None) -> str:
    """Return a score or its standard error: in hundredths, but what is no fraction as it is."""
    return hundredths(value) if is_fraction(metric) else decimal(value, 2)


def byte_size(count: float | None) -> str:
    """Return a number of bytes in decimal units, as 1.23 GB."""
    if count is None:
        return MISSING
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1)):
        if round(count, digits) < 1000:
            return f"{count:.{digits}f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float | None) -> str:
    """Return a time as 1:02:03 or 2:03."""
    if seconds is None:
        return MISSING
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def short_count(number: int) -> str:
    """Return a number in thousands, millions or billions, as 6.74B."""
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * size:  # what rounds to three digits of the next unit
            return f"{number / size:.3g}{name}"
    return str(number)
