"""Examples: both templates, raw rows and local files, and what is said of those that are wrong."""

import gzip
import json
import random
import re
from pathlib import Path

import datasets
import pytest

from moc_cli.data import commonsense
from moc_cli.data.examples import PairExample, fingerprint, hold_out, subset
from moc_cli.data.prompts import eval_prompt, template_hash, train_prompt
from moc_cli.data.source import BadRow, build_rows, text_or_empty
from moc_cli.data.suites import load_examples, scored_names, splits
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
    with pytest.raises(DataError, match=r"x, row 2: '\w+' is"):
        build_rows([raw, raw | {label: "9"}], "x", lambda row: commonsense.from_hub(task, row))
    text = next(name for name, value in raw.items() if name in commonsense_columns(task))
    missing = {name: value for name, value in raw.items() if name != text}
    with pytest.raises(DataError, match=f"x, row 1: no '{text}'"):
        build_rows([missing], "x", lambda row: commonsense.from_hub(task, row))


def commonsense_columns(task: str) -> tuple[str, ...]:
    """The columns that the instruction of a task is made of."""
    return ("question", "goal", "context", "ctx", "sentence", "question_stem")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"answer": "maybe"}, "'answer' is 'maybe', not one of true, false"),
        ({"output": "true"}, "'output' is not 'the correct answer is ' and the answer"),
        ({"input": "context"}, "'input' is not empty"),
        ({"instruction": "Is it?"}, "does not end in 'Answer format: '"),
        ({"instruction": "Q\n\nAnswer format: yes/no"}, "not like 'true/false'"),
        ({"instruction": 3}, "'instruction' is 3, not a text"),
    ],
)
def test_bad_field_is_named(tmp_path: Path, change: dict, complaint: str) -> None:
    write(tmp_path, "boolq", "train", [fields(), fields(**change)])
    with pytest.raises(DataError) as caught:
        load_examples("commonsense", "boolq", "train", path=tmp_path)
    assert "train.jsonl.gz, line 2: " in caught.value.message
    assert complaint in caught.value.message


def test_every_bad_line_is_named_at_once(tmp_path: Path) -> None:
    lines: list[object] = [fields(number) for number in range(12)]
    lines[1] = b"{broken"
    lines[3] = b""
    for bad in (5, 6, 7, 10):
        lines[bad] = fields(answer="true", output="true")
    lines[9] = b"\xff\xfe"
    lines[11] = [1, 2]
    path = write(tmp_path, "boolq", "test", lines)
    with pytest.raises(DataError) as caught:
        load_examples("commonsense", "boolq", "test", path=tmp_path)
    said = caught.value.message.splitlines()
    assert said[0].startswith(f"{path}, line 2: not JSON: Expecting property name")
    assert said[1] == f"{path}, line 4: an empty line"
    assert said[2].startswith(f"{path}, lines 6-8, 11: 'output'")
    assert said[3] == f"{path}, line 10: not UTF-8 text"
    assert said[4] == f"{path}, line 12: not a JSON object"
    assert len(said) == 5


def test_odd_lines_of_a_benchmark_are_named_or_read(tmp_path: Path) -> None:
    odd = fields(7)
    odd["instruction"] = f"one\u2028{odd['instruction']}"
    raw = json.dumps(odd, ensure_ascii=False).encode()
    path = write(tmp_path, "boolq", "test", [fields(), raw, fields(1)])
    rows = load_examples("commonsense", "boolq", "test", path=tmp_path)
    assert len(rows) == 3
    assert "one\u2028" in rows[1].eval_prompt
    long, deep = b'{"answer": ' + b"9" * 5000 + b"}", b'{"answer": ' + b"[" * 100_000
    write(tmp_path, "boolq", "test", [fields(), long, deep])
    with pytest.raises(DataError) as caught:
        load_examples("commonsense", "boolq", "test", path=tmp_path)
    assert caught.value.message.splitlines() == [
        f"{path}, line 2: a number of too many digits",
        f"{path}, line 3: not JSON that can be read: nested too deeply",
    ]


@pytest.mark.parametrize("zipped", [True, False])
def test_local_rows_are_read_in_order(tmp_path: Path, zipped: bool) -> None:
    write(tmp_path, "boolq", "train", [fields(n) for n in range(20)], zipped)
    examples = load_examples("commonsense", "boolq", "train", path=str(tmp_path))
    assert [commonsense.from_fields("boolq", fields(n)) for n in range(20)] == examples


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "boolq", "train", [fields()], zipped=True)
    write(tmp_path, "boolq", "train", [fields()], zipped=False)
    with pytest.raises(DataError, match="both exist"):
        load_examples("commonsense", "boolq", "train", path=tmp_path)


def test_file_that_breaks_off_is_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    path = write(tmp_path, "boolq", "train", [fields(rng.randrange(10**9)) for _ in range(5000)])
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"train.jsonl.gz is damaged after line \d+"):
        load_examples("commonsense", "boolq", "train", path=tmp_path)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "boolq", "train", [])
    with pytest.raises(DataError, match="has no rows"):
        load_examples("commonsense", "boolq", "train", path=tmp_path)


def test_wrong_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        load_examples("commonsense", "boolq", "train", path=tmp_path / "absent")
    write(tmp_path / "commonsense", "boolq", "train", [fields()])
    with pytest.raises(DataError) as caught:
        load_examples("commonsense", "boolq", "train", path=tmp_path)
    assert caught.value.hint == f"set data.path: {tmp_path / 'commonsense'}"
    with pytest.raises(DataError, match=r"no test\.jsonl\.gz") as caught:
        load_examples("commonsense", "boolq", "test", path=tmp_path / "commonsense")
    with pytest.raises(DataError) as caught:
        load_examples("commonsense", "piqa", "test", path=tmp_path / "commonsense")
    assert caught.value.hint == "tasks there: boolq"


@pytest.mark.parametrize(
    ("suite", "task", "split", "said"),
    [
        ("commonsense", "arc_easy", "train", "did you mean 'ARC-Easy'"),
        ("glue", "mrcp", "train", "did you mean 'mrpc'"),
        ("comonsense", "boolq", "train", "did you mean 'commonsense'"),
        ("glue", "mrpc", "test", "its labels are hidden"),
        ("commonsense", "piqa", "validation", "rows are held out from train"),
        ("builtin", "world", "dev", "has no split 'dev'"),
    ],
)
def test_wrong_name_is_explained(suite: str, task: str, split: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        load_examples(suite, task, split)
    assert said in caught.value.message
    assert caught.value.hint


# The hub


def test_offline_and_absent_names_both_ways_out() -> None:
    with pytest.raises(MocError) as caught:
        load_examples("commonsense", "openbookqa", "test")
    assert "allenai/openbookqa (main), split test" in caught.value.message
    assert "data.path" in (caught.value.hint or "")
    assert "online" in (caught.value.hint or "")


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
    ("task", "label", "complaint"),
    [
        ("cola", 2, "'label' is 2, not one of 0 to 1"),
        ("cola", -1, "labels are hidden"),
        ("cola", True, "'label' is true, not a whole number"),
        ("cola", 1.0, "'label' is 1.0, not a whole number"),
        ("stsb", 5.1, "not a score from 0 to 5"),
        ("stsb", "5", "'label' is '5', not a number"),
    ],
)
def test_glue_label_out_of_range_is_refused(
    tmp_path: Path, task: str, label: object, complaint: str
) -> None:
    row = dict.fromkeys(TASKS["glue"][task].columns, "text")
    write(tmp_path, task, "train", [row | {"label": label}])
    with pytest.raises(DataError) as caught:
        load_examples("glue", task, "train", path=tmp_path)
    assert complaint in caught.value.message


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
            assert set(scored_names(suite, task).values()) < set(splits(suite, task))


# Built-in


def test_builtin_rows_are_answerable() -> None:
    parts = {
        split: load_examples("builtin", "world", split) for split in splits("builtin", "world")
    }
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
        with pytest.raises(DataError, match="rows, row 1"):
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
    rest, held = hold_out(examples, 20, seed=1)
    assert len(set(held)) == len(held) == 20
    assert not set(rest) & set(held)
    assert set(rest) | set(held) == set(examples)
    assert hold_out(examples, 20, seed=1) == (rest, held)
    assert hold_out(examples, 20, seed=2) != (rest, held)
    assert hold_out(examples, 0, seed=1) == (examples, [])


def test_holding_out_everything_is_refused() -> None:
    with pytest.raises(DataError, match="cannot hold out 50 of 50"):
        hold_out(numbered(50), 50, seed=0)
    with pytest.raises(DataError, match="cannot hold out 51 of 80"):
        hold_out(numbered(50) + numbered(30), 51, seed=0)


def test_subset_keeps_the_order() -> None:
    examples = numbered(100)
    chosen = subset(examples, 10, seed=3)
    assert len(chosen) == 10
    assert [e for e in examples if e in chosen] == chosen
    assert subset(examples, None, seed=3) == subset(examples, 100, seed=3) == examples
    assert subset(examples, 10, seed=4) != chosen


def test_choosing_rows_leaves_the_global_generator_alone() -> None:
    before = random.getstate()
    hold_out(numbered(50), 5, seed=0)
    subset(numbered(50), 5, seed=0)
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
    bad = {
        "not a text": {"a": 1},
        "not UTF-8 text": {"a": "\ud83d"},
        "did you mean 'ab'": {"ab": 1},
    }
    for message, fields in bad.items():
        with pytest.raises(BadRow, match=message):
            text_or_empty(fields, "a" if "a" in fields else "abc")
