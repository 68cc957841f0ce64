"""Sentences about a training and an export, one line each."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moc_cli.report.numbers import byte_size, duration, percent, short_count
from moc_cli.results import LOWER_IS_BETTER

if TYPE_CHECKING:
    from moc_cli.methods import Counts

_CLASSES = 20  # names of classes in one line


def labelled(name: str, text: str) -> str:
    """Return a line that begins with its name."""
    return f"{name:<8}{text}"


def device_line(facts: Mapping[str, Any]) -> str:
    """Name the device and the threads; `facts` are the environment's."""
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return labelled("device", f"{facts['kind']} ({facts['name']}), {threads}")


def model_line(name: str, weights: int, dtype: str, quantized: str, size: int) -> str:
    """Name the base model with its size and type; `quantized` is "" for weights in `dtype`."""
    text = f"{name}, {short_count(weights)} frozen weights in {quantized or dtype}"
    if quantized:
        text += f", {byte_size(size)} with what stays in {dtype}"
    return labelled("model", text)


def method_line(name: str, counts: "Counts") -> str:
    """Name the method with what it trains."""
    share = percent(counts.share, 3)
    text = f"{name}, {counts.adapter:,} trained parameters, {share} of the base"
    if counts.modules:
        text += f", and {counts.modules:,} of fresh modules"
    return labelled("method", text)


def rows_line(
    *,
    train: int,
    validation: int,
    scored: int,
    max_length: int,
    truncated: int,
    answers_cut_off: int,
    dropped: Mapping[str, Mapping[str, int]],
) -> str:
    """Count the rows of each part, those that were cut and those left out."""
    parts = [f"{train:,} rows to train on"]
    if validation:
        parts.append(f"{validation:,} to validate on")
    parts.append(f"{scored:,} to score")
    text = ", ".join(parts)
    if truncated:
        text += f"; {truncated:,} cut to {max_length} tokens"
    if answers_cut_off:
        text += f", {answers_cut_off:,} of them lose their whole answer"
    if dropped:
        text += f"; left out: {dropped_rows(dropped)}"
    return labelled("data", text)


def taken_lines(taken: Mapping[str, Any] | None) -> list[str]:
    """Say what the rows of a custom dataset were taken for; none for a benchmark."""
    if taken is None:
        return []
    columns = list(taken["column_of"].values())
    listed = " and ".join(filter(None, [", ".join(columns[:-1]), columns[-1]]))
    text = f"{taken['format']} by {listed} ({taken['why']})"
    labels = taken["labels"]
    if labels:
        names = [str(label)[:40] for label in labels[:_CLASSES]]
        and_more = ", ..." if len(labels) > _CLASSES else ""
        text += f", {len(labels)} classes: {', '.join(names)}{and_more}"
    if taken["not_read"]:
        text += f"; not read: {', '.join(name[:40] for name in taken['not_read'])}"
    return [labelled("rows", text), *(labelled("rows", note) for note in taken["notes"])]


def dropped_rows(dropped: Mapping[str, Mapping[str, int]]) -> str:
    """Count by part and reason the rows that had nothing to learn."""
    return "; ".join(
        f"of {part} " + ", ".join(f"{count:,} with {reason}" for reason, count in reasons.items())
        for part, reasons in dropped.items()
    )


def watched_line(step: int, values: Mapping[str, float]) -> str:
    """Return one evaluation's numbers."""
    numbers = (
        f"{name} {value:.4f}" if name in LOWER_IS_BETTER else f"{name} {100 * value:.1f}"
        for name, value in values.items()
    )
    return f"step {step}: validation {', '.join(numbers)}"


def summary_line(results: Mapping[str, Any], folder: Path) -> str:
    """Return what a finished run took, and where its controls are."""
    early = " (stopped early)" if results["stopped"] == "early" else ""
    return (
        f"{results['steps']:,} steps{early}, {results['epochs']:.3g} epochs, "
        f"{results['tokens']:,} tokens in {duration(results['seconds'])}; "
        f"{percent(results['padding_share'])} padding. "
        f"Saved: the {results['controls']['chosen']} controls (step {results['controls']['step']}) "
        f"in {folder / 'controls'}"
    )


def parity_line(parity: Mapping[str, Any]) -> str:
    """Return how the logits that a fresh process computed compare with the run's."""
    limit = (
        "equal to the bit"
        if parity["bit_equal"]
        else f"within {parity['max_difference']:.3g} ({parity['relative_difference']:.2g} of the "
        f"largest; {parity['tolerance']:g} of it allowed)"
    )
    text = f"read back by a fresh process: logits of {parity['positions']} positions {limit}"
    rounding = parity.get("rounding")
    if rounding:
        text += (
            f" to the run rounded alike; rounding moved a logit by up to "
            f"{rounding['max_difference']:.3g} ({rounding['relative_difference']:.2g} of the "
            f"largest), {percent(rounding['same_best'])} have the same most likely token"
        )
    return text
