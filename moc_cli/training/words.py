"""The remarks of a run in one line each."""

from pathlib import Path
from typing import Any

import torch

from moc_cli.data.custom.rows import counted
from moc_cli.data.encode import Encoded
from moc_cli.data.splits import Splits
from moc_cli.methods import Counts
from moc_cli.report.tables import duration
from moc_cli.training.best import LOWER_IS_BETTER
from moc_cli.training.build import Built
from moc_cli.training.environment import describe_device


def columns(name: str, text: str) -> str:
    """Return a remark under its name."""
    return f"{name:<8}{text}"


def device(chosen: torch.device) -> str:
    """Name the device and the threads."""
    facts = describe_device(chosen)
    threads = "1 thread" if facts["threads"] == 1 else f"{facts['threads']} threads"
    return f"{facts['kind']} ({facts['name']}), {threads}"


def model(built: Built) -> str:
    """Name the base model with its size and type."""
    base = built.adapted.counts().base
    return f"{built.name}, {count(base)} frozen weights in {built.dtype}"


def method(name: str, counts: Counts) -> str:
    """Name the method with what it trains."""
    text = f"{name}, {counts.adapter:,} trained numbers, {100 * counts.share:.3g} % of the base"
    return text + (f", and {counts.modules:,} of fresh modules" if counts.modules else "")


def rows(found: Splits, encoded: Encoded, max_length: int) -> str:
    """Count the rows of each part, and those that were cut."""
    scored = sum(map(len, found.tests.values()))
    parts = [f"{len(found.train):,} rows to train on"]
    if found.validation:
        parts.append(f"{len(found.validation):,} to watch")
    parts.append(f"{scored:,} to score")
    text = ", ".join(parts)
    if encoded.truncated:
        text += f"; {encoded.truncated:,} cut to {max_length} tokens"
    if encoded.answerless:
        text += f", {encoded.answerless:,} of them without an answer left"
    if found.dropped:
        text += f"; left out: {dropped(found.dropped)}"
    return text


def dropped(reasons: dict[str, dict[str, int]]) -> str:
    """Count the rows that had nothing to learn."""
    return "; ".join(f"of {part} {counted(found)}" for part, found in reasons.items())


def watched(step: int, values: dict[str, float]) -> str:
    """Return one evaluation's numbers."""
    numbers = (
        f"{name} {value:.4f}" if name in LOWER_IS_BETTER else f"{name} {100 * value:.1f}"
        for name, value in values.items()
    )
    return f"step {step}: held-out {', '.join(numbers)}"


def count(number: int) -> str:
    """Return a number in thousands, millions or billions."""
    for size, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return str(number)


def summary(results: dict[str, Any], folder: Path) -> str:
    """Return what a finished run took, and where it is."""
    early = " (stopped early)" if results["stopped"] == "early" else ""
    return (
        f"{results['steps']:,} steps{early}, {results['epochs']:.3g} epochs, "
        f"{results['tokens']:,} tokens in {duration(results['seconds'])}; "
        f"{100 * results['padding_share']:.1f} % padding. "
        f"Kept: the {results['controls']['chosen']} controls (step {results['controls']['step']}) "
        f"in {folder / 'controls'}"
    )
