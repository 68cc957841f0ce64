"""Examples: both templates, raw rows and local files, and what is said of those that are wrong."""

import gzip
import json
import random
import re
from pathlib import Path

import datasets
import pytest
from support.messages import refused

from moc_cli.data import commonsense
from moc_cli.data.examples import PairExample, fingerprint, hold_out, subset
from moc_cli.data.prompts import eval_prompt, template_hash, train_prompt
from moc_cli.data.source import BadRow, build_rows, text_or_empty
from moc_cli.data.suites import load_examples, scored_names
from moc_cli.errors import DataError, MocError
from moc_cli.recipe.tasks import TASKS

HEADER = (
    b"Below is an instruction that describes a task. "
    b"Write a response that appropriately completes the request."
)
# One hand-made raw row of each task, in the hub's columns, and the instruction it must become.
RAW: dict[str, tuple[dict, str, str]] = {
    "boolq": (
        {"question": "is ice frozen water", "answer": True, "passage": "Ice is ..."},
        "Please answer the following question with true or false, question: is ice frozen water?"
        "\n\nAnswer format: true/false",
        "true",
    ),
    "piqa": (
        {"goal": "boil an egg", "sol1": "In oil ", "sol2": "In water", "label": 1},
        "Please choose the correct solution to the question: boil an egg"
        "\n\nSolution1: In oil \n\nSolution2: In water\n\nAnswer format: solution1/solution2",
        "solution2",
    ),
    "social_i_qa": (
        {
            "context": "Ann left.",
            "question": "Why did Ann do this?",
            "answerA": "bored",
            "answerB": "tired",
            "answerC": "late",
            "label": "3",
        },
        "Please choose the correct answer to the question: Ann left. Why did Ann do this?"
        "\n\nAnswer1: bored Answer2: tired Answer3: late\n\nAnswer format: answer1/answer2/answer3",
        "answer3",
    ),
    "hellaswag": (
        {
            "activity_label": "Rowing",
            "ctx_a": "A man rows.",
            "ctx_b": "he",
            "ctx": "A man rows. he",
            "endings": ["stops.", "flies.", "sings.", "melts."],
            "label": "0",
        },
        "Please choose the correct ending to complete the given sentence: Rowing: A man rows. he"
        "\n\nEnding1: stops. Ending2: flies. Ending3: sings. Ending4: melts."
        "\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending1",
    ),
    "winogrande": (
        {"sentence": "Jo beat Al as _ ran.", "option1": "Jo", "option2": "Al", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "Jo beat Al as _ ran.\n\nOption1: Jo Option2: Al Answer format: option1/option2",
        "option1",
    ),
    "ARC-Easy": (
        {
            "question": "Which is warm?",
            "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
            "answerKey": "2",
        },
        "Please choose the correct answer to the question: Which is warm?"
        "\n\nAnswer1: ice Answer2: fire Answer3: snow\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "ARC-Challenge": (
        {
            "question": "Which?",
            "choices": {"text": list("vwxyz"), "label": list("ABCDE")},
            "answerKey": "E",
        },
        "Please choose the correct answer to the question: Which?"
        "\n\nAnswer1: v Answer2: w Answer3: x Answer4: y Answer5: z"
        "\n\nAnswer format: answer1/answer2/answer3/answer4/answer5",
        "answer5",
    ),
    "openbookqa": (
        {
            "question_stem": "The sun is",
            "choices": {"text": ["a star", "a cat"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        "Please choose the correct answer to the question: The sun is"
        "\n\nAnswer1: a star Answer2: a cat\n\nAnswer format: answer1/answer2",
        "answer1",
    ),
}


def fields(number: int = 0, **changes: object) -> dict:
    """A good row of four fields."""
    instruction = f"Is {number} odd?\n\nAnswer format: true/false"
    row = {"instruction": instruction, "input": "", "output": "the correct answer is true"}
    return row | {"answer": "true"} | changes


def write(folder: Path, task: str, split: str, lines: list[object], zipped: bool = True) -> Path:
    """Write rows, or lines that are bytes already, as a local file."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    content = b"".join(line + b"\n" for line in raw)
    path = folder / task / f"{split}.jsonl{'.gz' if zipped else ''}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if zipped else content)
    return path


# Templates


def test_templates_are_those_bytes() -> None:
    indent = b"\x20" * 16
    train = [HEADER + b"  ", b"", indent + b"### Instruction:", indent + b"Q?", indent]
    train += [indent + b"### Response:", indent]
    evaluation = [HEADER + b" ", b"", indent + b"### Instruction:", indent + b"Q?", b""]
    evaluation += [indent + b"### Response:", indent]
    assert train_prompt("Q?").encode() == b"\n".join(train)
    assert eval_prompt("Q?").encode() == b"\n".join(evaluation)


def test_template_hash_is_stable() -> None:
    assert template_hash() == template_hash()
    assert re.fullmatch("[0-9a-f]{64}", template_hash())


# Commonsense


@pytest.mark.parametrize("task", TASKS["commonsense"])
def test_raw_row_becomes_instruction_and_answer(task: str) -> None:
    raw, instruction, answer = RAW[task]
    example = commonsense.from_hub(task, raw)
    output = f"the correct answer is {answer}"
    assert example.train_text == train_prompt(instruction) + output
    assert example.train_text[example.answer_start :] == output
    assert example.eval_prompt == eval_prompt(instruction)
    assert example.candidates[example.label] == output
    four = {"instruction": instruction, "input": "", "output": output, "answer": answer}
    assert commonsense.from_fields(task, four) == example


@pytest.mark.parametrize("task", TASKS["commonsense"])
def test_raw_row_of_a_wrong_label_or_column_is_refused(task: str) -> None:
    raw, _, _ = RAW[task]
    label = next(name for name in ("label", "answerKey", "answer") if name in raw)
    with refused(DataError):
        build_rows([raw, raw | {label: "9"}], "x", lambda row: commonsense.from_hub(task, row))
    text = next(name for name, value in raw.items() if name in commonsense_columns(task))
    missing = {name: value for name, value in raw.items() if name != text}
    with refused(DataError):
        build_rows([missing], "x", lambda row: commonsense.from_hub(task, row))


def commonsense_columns(task: str) -> tuple[str, ...]:
    """The columns that the instruction of a task is made of."""
    return ("question", "goal", "context", "ctx", "sentence", "question_stem")


@pytest.mark.parametrize(
    "change",
    [
        {"answer": "maybe"},
        {"output": "true"},
        {"input": "context"},
        {"instruction": "Is it?"},
        {"instruction": "Q\n\nAnswer format: yes/no"},
        {"instruction": 3},
    ],
)
def test_bad_field_is_named(tmp_path: Path, change: dict) -> None:
    write(tmp_path, "boolq", "train", [fields(), fields(**change)])
    with refused(DataError):
        load_examples("commonsense", "boolq", "train", path=tmp_path)


def test_every_bad_line_is_named_at_once(tmp_path: Path) -> None:
    lines: list[object] = [fields(number) for number in range(12)]
    lines[1] = b"{broken"
    lines[3] = b""
    for bad in (5, 6, 7, 10):
        lines[bad] = fields(answer="true", output="true")
    lines[9] = b"\xff\xfe"
    lines[11] = [1, 2]
    write(tmp_path, "boolq", "test", lines)
    with refused(DataError):
        load_examples("commonsense", "boolq", "test", path=tmp_path)


def test_odd_lines_of_a_benchmark_are_named_or_read(tmp_path: Path) -> None:
    odd = fields(7)
    odd["instruction"] = f"one\u2028{odd['instruction']}"
    raw = json.dumps(odd, ensure_ascii=False).encode()
    write(tmp_path, "boolq", "test", [fields(), raw, fields(1)])
    rows = load_examples("commonsense", "boolq", "test", path=tmp_path)
    assert len(rows) == 3
    assert "one\u2028" in rows[1].eval_prompt
    long, deep = b'{"answer": ' + b"9" * 5000 + b"}", b'{"answer": ' + b"[" * 100_000
    write(tmp_path, "boolq", "test", [fields(), long, deep])
    with refused(DataError):
        load_examples("commonsense", "boolq", "test", path=tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_local_rows_are_read_in_order(tmp_path: Path, zipped: bool) -> None:
    write(tmp_path, "boolq", "train", [fields(n) for n in range(20)], zipped)
    examples = load_examples("commonsense", "boolq", "train", path=str(tmp_path))
    assert [commonsense.from_fields("boolq", fields(n)) for n in range(20)] == examples


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "boolq", "train", [fields()], zipped=True)
    write(tmp_path, "boolq", "train", [fields()], zipped=False)
    with refused(DataError):
        load_examples("commonsense", "boolq", "train", path=tmp_path)


def test_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = write(tmp_path, "boolq", "train", [fields(rng.randrange(10**9)) for _ in range(5000)])
    path.write_bytes(path.read_bytes()[:-2000])
    with refused(DataError, line=r"(?<=line )\d+"):
        load_examples("commonsense", "boolq", "train", path=tmp_path)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "boolq", "train", [])
    with refused(DataError):
        load_examples("commonsense", "boolq", "train", path=tmp_path)


def test_wrong_folder_is_explained(tmp_path: Path) -> None:
    with refused(DataError):
        load_examples("commonsense", "boolq", "train", path=tmp_path / "absent")
    write(tmp_path / "commonsense", "boolq", "train", [fields()])
    with refused(DataError):
        load_examples("commonsense", "boolq", "train", path=tmp_path)
    with refused(DataError):
        load_examples("commonsense", "boolq", "test", path=tmp_path / "commonsense")
    with refused(DataError):
        load_examples("commonsense", "piqa", "test", path=tmp_path / "commonsense")


@pytest.mark.parametrize(
    ("suite", "task", "split"),
    [
        ("commonsense", "arc_easy", "train"),
        ("glue", "mrcp", "train"),
        ("comonsense", "boolq", "train"),
        ("glue", "mrpc", "test"),
        ("commonsense", "piqa", "validation"),
        ("builtin", "world", "dev"),
    ],
)
def test_wrong_name_is_explained(suite: str, task: str, split: str) -> None:
    with refused(DataError):
        load_examples(suite, task, split)


# The hub


def test_offline_and_absent_names_both_ways_out() -> None:
    with refused(MocError, reason="(?<=hub: ).*"):
        load_examples("commonsense", "openbookqa", "test")


def test_hub_rows_come_from_the_right_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def load_dataset(repo: str, name: str | None, *, split: str, revision: str | None):  # noqa: ANN202
        asked.append((repo, name, split, revision))
        return datasets.Dataset.from_list([RAW[task][0]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for task in TASKS["commonsense"]:
        for split in ("train", "test"):
            examples = load_examples("commonsense", task, split)
            assert set(examples) == {commonsense.from_hub(task, RAW[task][0])}
    sizes = ("xs", "s", "m", "l", "xl", "debiased")
    winogrande = [config for repo, config, split, _ in asked if (repo, split) == WINOGRANDE_TRAIN]
    assert winogrande == [f"winogrande_{size}" for size in sizes]
    test = {repo: split for repo, _, split, _ in asked if split != "train"}
    official = ("allenai/ai2_arc", "allenai/openbookqa")
    assert {repo for repo, split in test.items() if split == "test"} == set(official)
    assert len(test) == 7
    assert {split for repo, split in test.items() if repo not in official} == {"validation"}


WINOGRANDE_TRAIN = ("allenai/winogrande", "train")


# GLUE


def test_glue_row_becomes_example(tmp_path: Path) -> None:
    write(tmp_path, "cola", "train", [{"sentence": "It rains.", "label": 1, "idx": 4}])
    write(tmp_path, "stsb", "train", [{"sentence1": "a", "sentence2": "b", "label": 5}])
    (single,) = load_examples("glue", "cola", "train", path=tmp_path)
    (pair,) = load_examples("glue", "stsb", "train", path=tmp_path)
    assert single == PairExample("cola", "It rains.", None, 1)
    assert pair == PairExample("stsb", "a", "b", 5.0)


@pytest.mark.parametrize(
    ("task", "label"),
    [("cola", 2), ("cola", -1), ("cola", True), ("cola", 1.0), ("stsb", 5.1), ("stsb", "5")],
)
def test_glue_label_out_of_range_is_refused(tmp_path: Path, task: str, label: object) -> None:
    row = dict.fromkeys(TASKS["glue"][task].columns, "text")
    write(tmp_path, task, "train", [row | {"label": label}])
    with refused(DataError):
        load_examples("glue", task, "train", path=tmp_path)


def test_mnli_has_two_validation_splits(tmp_path: Path) -> None:
    row = {"premise": "a", "hypothesis": "b", "label": 2}
    write(tmp_path, "mnli", "validation_matched", [row])
    write(tmp_path, "mnli", "validation_mismatched", [row, row])
    assert scored_names("glue", "mnli") == {
        "mnli": "validation_matched",
        "mnli (mismatched)": "validation_mismatched",
    }
    assert len(load_examples("glue", "mnli", "validation", path=tmp_path)) == 1
    assert len(load_examples("glue", "mnli", "validation_mismatched", path=tmp_path)) == 2


def test_every_task_has_splits() -> None:
    assert len(TASKS["commonsense"]) >= 8
    assert len(TASKS["glue"]) >= 9
    for suite, tasks in TASKS.items():
        for task in tasks:
            assert set(scored_names(suite, task).values()) < set(TASKS[suite][task].splits)


# Built-in


def test_builtin_rows_are_answerable() -> None:
    splits = TASKS["builtin"]["world"].splits
    parts = {split: load_examples("builtin", "world", split) for split in splits}
    for examples in parts.values():
        assert all(len(example.candidates) >= 2 for example in examples)
    prompts = {split: {e.eval_prompt for e in examples} for split, examples in parts.items()}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["validation"]
    assert not prompts["validation"] & prompts["test"]


def test_options_must_be_different_texts() -> None:
    good = fields(candidates=["true", "false"])
    assert commonsense.from_options("world", good).candidates[0].endswith("true")
    for bad in (["true", "true"], ["true"], ["true", 3], "true"):
        with refused(DataError):
            build_rows(
                [good | {"candidates": bad}],
                "rows",
                lambda row: commonsense.from_options("world", row),
            )


# Choosing rows


def numbered(count: int) -> list[PairExample]:
    """Different examples."""
    return [PairExample("cola", f"sentence {number}", None, 0) for number in range(count)]


def test_held_out_rows_leave_the_rest_copies_too() -> None:
    examples = numbered(50) + numbered(30)
    rest, held = hold_out(examples, 20)
    assert len(set(held)) == len(held) == 20
    assert not set(rest) & set(held)
    assert set(rest) | set(held) == set(examples)
    assert hold_out(examples, 20) == (rest, held)
    assert hold_out(examples, 0) == (examples, [])


def test_holding_out_everything_is_refused() -> None:
    with refused(DataError):
        hold_out(numbered(50), 50)
    with refused(DataError):
        hold_out(numbered(50) + numbered(30), 51)


def test_subset_keeps_the_order() -> None:
    examples = numbered(100)
    chosen = subset(examples, 10)
    assert len(chosen) == 10
    assert [e for e in examples if e in chosen] == chosen
    assert subset(examples, None) == subset(examples, 100) == examples


def test_choosing_rows_leaves_the_global_generator_alone() -> None:
    before = random.getstate()
    hold_out(numbered(50), 5)
    subset(numbered(50), 5)
    assert random.getstate() == before


def test_fingerprint_tells_rows_labels_and_order_apart() -> None:
    examples = numbered(3)
    changed = [*examples[:2], PairExample("cola", "sentence 2", None, 1)]
    moved = examples[::-1]
    prints = {fingerprint(rows) for rows in (examples, changed, moved, examples[:2])}
    assert len(prints) == 4
    assert fingerprint(numbered(3)) == fingerprint(examples)


# Real rows


@pytest.mark.real
def test_real_rows_are_all_good(real_data: Path) -> None:
    counts = {"ARC-Easy": (2251, 2376), "openbookqa": (4957, 500), "winogrande": (63238, 1267)}
    for task, expected in counts.items():
        found = [
            load_examples("commonsense", task, split, path=real_data / "commonsense")
            for split in ("train", "test")
        ]
        assert tuple(map(len, found)) == expected
    for task, rows in {"mrpc": 408, "stsb": 1500, "cola": 1043, "sst2": 872}.items():
        assert len(load_examples("glue", task, "validation", path=real_data / "glue")) == rows


@pytest.mark.real
@pytest.mark.parametrize("task", TASKS["commonsense"])
def test_builders_write_what_real_rows_hold(real_data: Path, task: str) -> None:
    """Take a real instruction apart, build it again from its parts, and get the same bytes."""
    path = real_data / "commonsense" / task / "test.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(300), strict=False)]
    parsed = [(row, raw) for row in rows if (raw := take_apart(task, row))]
    assert len(parsed) > 250
    for row, raw in parsed:
        assert commonsense.from_hub(task, raw) == commonsense.from_fields(task, row)


def take_apart(task: str, row: dict) -> dict | None:
    """The raw row behind four fields; None where an option's own text looks like a marker."""
    body, _, _ = row["instruction"].rpartition("Answer format:")
    if task == "boolq":
        question = body.removesuffix("?\n\n").partition("question: ")[2]
        return {"question": question, "answer": row["answer"] == "true"}
    stem = TASKS["commonsense"][task].answers[0].rstrip("1").capitalize()
    between = "\n\n" if task == "piqa" else " "
    parts = re.split(rf"(?:\n\n|{between}){stem}\d: ", body.removesuffix("\n\n"))
    question, options = parts[0].partition(": ")[2], parts[1:]
    right = int(row["answer"][-1])
    if task == "winogrande":
        options[-1] = options[-1].removesuffix(" ")
    if len(options) != len(commonsense.from_fields(task, row).candidates):
        return None
    letters = "ABCDE"[: len(options)]
    choices = {"text": options, "label": list(letters)}
    context, _, ending = question.partition(" ")
    activity, _, start = question.partition(": ")
    return {
        "piqa": {"goal": question, "label": right - 1}
        | {f"sol{n}": text for n, text in enumerate(options, 1)},
        "social_i_qa": {"context": context, "question": ending, "label": str(right)}
        | {f"answer{letter}": text for letter, text in zip(letters, options, strict=True)},
        "hellaswag": {
            "activity_label": activity,
            "ctx": start,
            "endings": options,
            "label": str(right - 1),
        },
        "winogrande": {"sentence": question, "answer": str(right)}
        | {f"option{n}": text for n, text in enumerate(options, 1)},
        "openbookqa": {
            "question_stem": question,
            "choices": choices,
            "answerKey": letters[right - 1],
        },
    }.get(task, {"question": question, "choices": choices, "answerKey": letters[right - 1]})


def test_the_text_of_a_column_is_empty_for_null_and_nothing_else_is_a_text():
    assert [text_or_empty({"a": value}, "a") for value in ("x ", "", None)] == ["x ", "", ""]
    for fields in ({"a": 1}, {"a": "\ud83d"}, {"ab": 1}):
        with refused(BadRow):
            text_or_empty(fields, "a" if "a" in fields else "abc")
