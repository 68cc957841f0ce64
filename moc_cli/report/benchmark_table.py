"""What `moc bench` measured, as a table."""

from collections.abc import Mapping
from typing import Any

from moc_cli.report.numbers import MISSING, byte_size, decimal
from moc_cli.report.tables import FittedTable

COLUMN_WIDTH = 14


def benchmark_table(results: Mapping[str, Any]) -> FittedTable:
    """Show what `moc bench --json` prints: times, speed, memory, and the ratios with intervals."""
    training = results["measured"] == "training"
    entries = results["methods"]
    references = [
        name
        for name in (("control", "lora") if training else ("base",))
        if any(e[f"ratio_to_{name}"] for e in entries.values() if e["method"] != name)
    ]
    time = ["s a step", "examples/s"] if training else ["rows", "s a batch"]
    ratio = "time" if training else "tokens/s"
    head = [
        "method",
        *time,
        "tokens/s",
        "peak memory",
        *(f"{ratio} ÷\n{name}" for name in references),
    ]
    rows = []
    for entry in entries.values():
        if training:
            cells = [_digits(entry["step_seconds"]), _digits(entry["examples_per_second"])]
        else:
            cells = [str(entry["rows"]), _digits(entry["batch_seconds"])]
        cells += [_digits(entry["tokens_per_second"]), byte_size(entry["peak_bytes"])]
        cells += [_ratio(entry, reference) for reference in references]
        tried = [_short(change) for change in entry["changes"]]
        rows.append([" ".join([entry["method"], *tried]), *cells])
    title = "Training steps" if training else "Generation"
    turns = f"medians of {results['repeats']} turns; of ratios also the 95 % interval"
    return FittedTable(title, head, rows, notes=[turns], column_width=COLUMN_WIDTH)


def _short(change: str) -> str:
    """Return a change of the recipe with the last word of its key: `alpha=0.5`."""
    key, equals, value = change.partition("=")
    return key.rpartition(".")[2] + equals + value


def _ratio(entry: Mapping[str, Any], reference: str) -> str:
    value = entry[f"ratio_to_{reference}"]
    if value is None or entry["method"] == reference:
        return MISSING
    low, high = entry["interval"][f"ratio_to_{reference}"]
    return f"{value:.3f}\n{low:.3f}–{high:.3f}"


def _digits(value: float) -> str:
    """Return a number with about three digits that say something."""
    return decimal(value, 0 if value >= 100 else 1 if value >= 10 else 3 if value < 1 else 2)
