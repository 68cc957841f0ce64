"""Rows of the benchmarks' forms, which a tiny model learns in a few steps."""

import json
from pathlib import Path

WORDS = ("red", "blue", "green", "black")


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write JSON lines, and the folder that the file is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def choice_rows(count: int) -> list[dict]:
    """Questions of ARC's form; the answer is always the second option."""
    rows = []
    for number in range(count):
        listed = " ".join(f"Answer{i + 1}: {WORDS[(number + i) % 4]}" for i in range(3))
        rows.append(
            {
                "instruction": f"Please choose the correct answer to the question: what is "
                f"{'very ' * (number % 3)}{number}?\n\n{listed}\n\n"
                "Answer format: answer1/answer2/answer3",
                "input": "",
                "output": "the correct answer is answer2",
                "answer": "answer2",
            }
        )
    return rows


def pair_rows(count: int, labels: list) -> list[dict]:
    """Pairs of sentences whose first words tell which of `labels` they have."""
    return [
        {
            "sentence1": f"{WORDS[n % len(labels)]} {'so ' * (n % 3)}{n}",
            "sentence2": WORDS[n % len(labels)],
            "label": labels[n % len(labels)],
        }
        for n in range(count)
    ]
