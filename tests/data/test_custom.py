"""Custom datasets: what is read from which file, and the error of every malformed one."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from support.messages import refused

from moc_cli.data.custom.frame import instruction_prompt
from moc_cli.data.custom.rows import CustomRows, read_custom, read_scored
from moc_cli.data.examples import (
    ChatExample,
    InstructionExample,
    PairExample,
    TextExample,
    fingerprint,
)
from moc_cli.data.splits import read_splits
from moc_cli.errors import DataError
from moc_cli.recipe.names import ColumnsSection
from moc_cli.recipe.sections import DataSection
from moc_cli.report.lines import taken_lines


def read(path: Path, **keys: object) -> CustomRows:
    """Read rows as a recipe with these keys of `data` would; by default none are held out."""
    return read_custom(section(path, **{"held_out": 1, **keys}))


def section(path: Path, **keys: object) -> DataSection:
    return DataSection.model_validate({"suite": "custom", "path": str(path), **keys})


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def pairs(*labels: object) -> list[dict]:
    return [{"text": f"row {n}", "label": label} for n, label in enumerate(labels)]


def save_parquet(path: Path, rows: list[dict]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


TEXT_AND_LABEL = {"text": "text", "label": "label"}
GOOD_CHAT = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
}


def chat(*messages: object) -> dict:
    return {"messages": list(messages)}


def said(role: str, content: object) -> dict:
    return {"role": role, "content": content}


# Formats


def test_the_columns_tell_the_format(tmp_path):
    cases = {
        "chat": [GOOD_CHAT, chat(said("user", "a"), said("assistant", "b"))],
        "instruction": [{"instruction": "Say a", "output": "a"}, {"prompt": "b", "output": "b"}],
        "text": [{"text": "one", "id": 1}, {"text": "two", "id": 2}],
        "classification": pairs("b", "a", "b"),
        "regression": pairs(1, 2.5, 3),
    }
    cases["instruction"] = [{"instruction": f"Say {n}", "output": "a"} for n in range(2)]
    for name, rows in cases.items():
        found = read(write(tmp_path / f"{name}.jsonl", lines(*rows)))
        assert found.format == name
        assert len(found.train) == len(rows) - 1
    scores = read(write(tmp_path / "scores.jsonl", lines(*pairs(1, 2, 3))), format="regression")
    assert {example.label for example in scores.train + scores.test} == {1.0, 2.0, 3.0}


def test_every_file_gives_the_same_rows(tmp_path):
    rows = [{"sentence": f'row "{n}", é', "stars": n % 3} for n in range(9)]
    table = "".join(f'"row ""{n}"", é",{n % 3}\r\n' for n in range(9))
    comma = f"sentence,stars\r\n{table}"

    def separated(mark: str) -> str:
        return comma.replace('é",', f'é"{mark}').replace("e,s", f"e{mark}s")

    marked = "\ufeff" + lines(*rows).replace("\n", "\r\n")
    files = [
        write(tmp_path / "a.jsonl", lines(*rows)),
        write(tmp_path / "a.jsonl.gz", gzip.compress(lines(*rows).encode())),
        write(tmp_path / "crlf.jsonl", marked),
        write(tmp_path / "a.json", json.dumps(rows)),
        write(tmp_path / "a.csv", comma),
        write(tmp_path / "bom.csv", "\ufeff" + comma),
        write(tmp_path / "semicolon.csv", separated(";")),
        write(tmp_path / "a.tsv", separated("\t")),
        save_parquet(tmp_path / "a.parquet", rows),
    ]
    columns = {"label": "stars"}
    found = [read(file, columns=columns) for file in files]
    assert found[0].labels == [0, 1, 2]
    assert found[0].train[0].text_a.endswith('", é')
    for other in found[1:]:
        assert (other.labels, other.train, other.test) == (
            found[0].labels,
            found[0].train,
            found[0].test,
        )


def test_a_field_may_hold_line_breaks_and_rows_are_named_by_their_first_line(tmp_path):
    text = 'text,label\n"two\nlines",a\nplain,b\n"more\n\nlines",b\nodd\n'
    file = write(tmp_path / "a.csv", text)
    with refused(DataError):
        read(file)
    found = read(write(file, text.replace("odd\n", "odd,a\n")))
    assert {e.text_a for e in found.train + found.test} >= {"two\nlines", "more\n\nlines"}


def test_labels_are_sorted_and_keep_their_kind(tmp_path):
    assert read(write(tmp_path / "a.csv", "text,label\na,10\nb,9\nc,-1\n")).labels == [-1, 9, 10]
    assert read(write(tmp_path / "b.csv", "text,label\na,10\nb,x\nc,9\n")).labels == [
        "10",
        "9",
        "x",
    ]
    assert read(write(tmp_path / "c.jsonl", lines(*pairs("10", "9", "9")))).labels == ["10", "9"]
    codes = read(write(tmp_path / "codes.csv", "text,label\na,01\nb,NA\nc,01\nd,02\n"))
    assert codes.labels == ["01", "02", "NA"]
    assert read(write(tmp_path / "f.csv", "text,label\na,01\nb,02\nc,01\n")).labels == ["01", "02"]
    assert read(write(tmp_path / "d.jsonl", lines(*pairs(1.0, 0.0, 1)))).labels == [0, 1]
    given = read(write(tmp_path / "e.csv", "text,label\na,1\nb,0\nc,1\n"), labels=[2, 1, 0])
    assert given.labels == [2, 1, 0]
    assert {(e.text_a, e.label) for e in given.train + given.test} == {("a", 1), ("b", 2), ("c", 1)}


def test_instructions_take_an_input_where_there_is_one(tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Greet.", "input": "", "output": "Hi\n"},
        {"instruction": "Greet again.", "input": None, "output": "Hi"},
        {"instruction": "Leave.", "output": "Bye"},
    ]
    found = read(write(tmp_path / "a.jsonl", lines(*rows)))
    whole = {example.train_text for example in found.train + found.test}
    head = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\n"
    )
    assert whole == {
        f"{head}Add.\n\n### Input:\n1 + 1\n\n### Response:\n2",
        f"{head}Greet.\n\n### Response:\nHi\n",
        f"{head}Greet again.\n\n### Response:\nHi",
        f"{head}Leave.\n\n### Response:\nBye",
    }
    example = InstructionExample("t", instruction_prompt("a"), "b")
    assert example.train_text[example.answer_start :] == "b"


def test_labels_as_data_frames_and_the_hub_write_them(tmp_path):
    floats = read(write(tmp_path / "a.csv", "text,label\na,0.0\nb,1.0\nc,1.0\n"))
    assert (floats.format, floats.labels) == ("classification", [0, 1])
    assert floats.taken["why"] == "labels are whole numbers"
    truths = read(write(tmp_path / "b.jsonl", lines(*pairs(True, False, True))))
    assert (truths.format, truths.labels) == ("classification", ["false", "true"])
    run = section(tmp_path / "b.jsonl", labels=["false", "true"], held_out=0)
    frame = write(tmp_path / "c.csv", "text,label\na,True\n")
    assert read_scored(run, str(frame))[0][0].label == 1
    with refused(DataError):
        read_scored(run)


def test_a_part_with_hidden_labels_is_left_out_and_said(tmp_path):
    write(tmp_path / "train.jsonl", lines(*pairs(0, 1, 0, 1)))
    write(tmp_path / "validation.jsonl", lines(*pairs(0, 1)))
    for hidden in (pairs(-1, -1), [{"text": "a"}], pairs(None, None)):
        write(tmp_path / "test.jsonl", lines(*hidden))
        found = read(tmp_path)
        assert found.scored == "validation"
        assert found.notes == [
            f"{tmp_path / 'test.jsonl'} is left out: none of its {len(hidden)} rows has 'label'"
        ]
    write(tmp_path / "test.jsonl", lines(*pairs(-1, 0)))
    with refused(DataError):
        read(tmp_path)


def test_rows_are_taken_for_something_and_the_rest_is_said(tmp_path):
    text = "id,text,label\n" + "".join(f"{n},row {n},{n % 3}\n" for n in range(9))
    taken = read(write(tmp_path / "a.csv", text)).taken
    assert taken_lines(taken) == [
        "rows    classification by text and label (labels are whole numbers), "
        "3 classes: 0, 1, 2; not read: id"
    ]


def test_questions_with_answers_are_instructions(tmp_path):
    rows = [{"question": f"q {n}", "context": "c", "answer": "a"} for n in range(3)]
    found = read(write(tmp_path / "a.jsonl", lines(*rows)))
    assert found.format == "instruction"
    assert found.columns.column_of == {
        "instruction": "question",
        "input": "context",
        "output": "answer",
    }


# Parts


def test_a_folder_has_parts(tmp_path):
    write(tmp_path / "train.csv", "text,label\na,x\nb,y\nc,x\n")
    write(tmp_path / "dev.jsonl", lines({"text": "d", "label": "y"}))
    found = read(tmp_path)
    assert (len(found.train), found.scored) == (3, "validation")
    assert found.validation == found.test == [PairExample("custom", "d", None, 1)]
    save_parquet(tmp_path / "test.parquet", [{"text": "e", "label": "x"}])
    found = read(tmp_path, tasks="mine")
    assert (found.scored, found.test) == ("test", [PairExample("mine", "e", None, 0)])
    assert [e.text_a for e in found.validation] == ["d"]


def test_rows_are_held_out_where_there_is_no_validation_file(tmp_path):
    write(tmp_path / "train.csv", "text\n" + "".join(f"row {n}\n" for n in range(10)) + "row 3\n")
    found = read(tmp_path, held_out=4)
    assert found.scored == "held_out"
    assert found.test == found.validation
    assert len(set(found.validation)) == 4
    assert not set(found.validation) & set(found.train)
    again = read(tmp_path, held_out=4)
    assert (again.train, again.test) == (found.train, found.test)
    copied = TextExample("custom", "row 3") in found.test
    assert found.dropped == ({"train": {"a held-out row's copy": 1}} if copied else {})
    assert len(read(tmp_path, held_out=0.2).test) == 2
    unscored = read(tmp_path, held_out=0)
    assert (len(unscored.train), unscored.test, unscored.scored) == (11, [], "none")
    write(tmp_path / "test.csv", "text\nnew\n")
    assert [e.train_text for e in read(tmp_path, held_out=4).test] == ["new"]
    assert len(read(tmp_path, held_out=4).train) < 11
    unwatched = read_custom(section(tmp_path, held_out=4), watched=False)
    assert (len(unwatched.train), unwatched.scored) == (11, "test")
    assert len(read(tmp_path, held_out=0).train) == 11


def test_a_run_is_scored_on_its_own_rows_or_on_those_of_another_file(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\n" + "".join(f"t{n},{n % 2}\n" for n in range(9)))
    data = section(file, held_out=3, format="classification", labels=[0, 1])
    assert read_scored(data)[0] == read_custom(data).test
    other = write(tmp_path / "b.jsonl", lines(*pairs(1, 1)))
    assert [example.label for example in read_scored(data, str(other))[0]] == [1, 1]
    write(other, lines(*pairs(1, 7)))
    with refused(DataError):
        read_scored(data, str(other))


def test_a_run_remembers_the_columns_that_it_was_trained_on(tmp_path):
    row = {"text": "x", "sentence1": "a", "sentence2": "b", "label": 1}
    rows = [row | {"label": n % 2} for n in range(6)]

    def trained(*names: str) -> DataSection:
        file = write(
            tmp_path / "train.jsonl", lines(*({key: each[key] for key in names} for each in rows))
        )
        return read_splits(section(file, held_out=0))[0]

    other = write(tmp_path / "other.jsonl", lines(row))
    pairs_run = trained("sentence1", "sentence2", "label")
    assert pairs_run.columns.text == "sentence1"
    (example,), notes = read_scored(pairs_run, str(other))
    assert (example.text_a, example.text_b, notes) == ("a", "b", [])
    (example,), notes = read_scored(trained("sentence1", "label"), str(other))
    assert (example.text_a, example.text_b) == ("a", None)
    said = f"{other}: not read: 'sentence2'; the run was trained on 'sentence1' alone"
    assert notes == [said]
    write(other, lines({"sentence1": "a", "sentence_2": "b", "label": 1}))
    with refused(DataError):
        read_scored(pairs_run, str(other))
    older = pairs_run.model_copy(update={"columns": ColumnsSection()})
    write(other, lines(row))
    assert read_scored(older, str(other))[1] == [
        f"{other} is read by 'text', 'sentence2', 'label'; the run does not name the columns "
        "that it was trained on"
    ]


def test_the_rows_of_another_folder_are_read_as_those_of_a_training(tmp_path):
    run = section(tmp_path, format="classification", labels=[0, 1], columns=TEXT_AND_LABEL)
    folder = tmp_path / "other"
    test = write(folder / "test.csv", "text,label\na,1\n\nb,0\n")
    examples, notes = read_scored(run, str(folder))
    assert [example.label for example in examples] == [1, 0]
    assert notes == [f"{test}: left out, and not numbered: 1 with a blank line"]
    write(test, "text,label\na,-1\nb,-1\n")
    valid = write(folder / "valid.csv", 'text,label\n"a\nb",1\n,1\n')
    examples, notes = read_scored(run, str(folder))
    assert [example.text_a for example in examples] == ["a\nb"]
    assert notes == [
        f"{test} is left out: none of its 2 rows has 'label'",
        f"{valid}: 1 rows go over several lines, in quotation marks",
        f"{valid}: left out, and not numbered: 1 with an empty text",
    ]
    valid.unlink()
    with refused(DataError):
        read_scored(run, str(folder))


def test_rows_with_nothing_to_learn_are_left_out_and_counted(tmp_path):
    rows = [{"instruction": f"do {n}", "output": "x"} for n in range(4)]
    odd = [{"instruction": " ", "output": "x"}, {"instruction": "a", "output": "\n"}, ""]
    found = read(write(tmp_path / "a.jsonl", lines(*rows, *odd, "", {**rows[0], "output": None})))
    assert found.dropped == {
        "train": {"a blank line": 2, "an empty instruction": 1, "an empty output": 2}
    }
    assert len(found.train) == 3
    silent = chat(said("user", "Hi"), said("assistant", " "))
    other = chat(said("user", "Ho"), said("assistant", "Hi"))
    found = read(write(tmp_path / "b.jsonl", lines(GOOD_CHAT, silent, other)))
    assert found.dropped == {"train": {"an empty answer": 1}}
    with refused(DataError):
        read(write(tmp_path / "c.csv", "text,label\n,a\n ,b\n"))


def test_fingerprints_are_of_the_content(tmp_path):
    one = ChatExample("t", (("user", "a"), ("assistant", "b")), ("x.jsonl", "line", 1))
    moved = ChatExample("t", (("user", "a"), ("assistant", "b")), ("y.jsonl", "line", 7))
    other = ChatExample("t", (("user", "a"), ("assistant", "c")), ("x.jsonl", "line", 1))
    assert fingerprint([one]) == fingerprint([moved]) != fingerprint([other])
    assert one == moved
    assert len({one, moved}) == 1


def test_bad_rows_are_named_all_at_once_and_counted_where_they_are_many(tmp_path):
    write(tmp_path / "train.jsonl", lines(*pairs("a", 2.5, "b"), "{", *pairs(None)))
    write(tmp_path / "test.csv", "text,label\nx,a\ny\nz,q\n")
    with refused(DataError):
        read(tmp_path, format="classification")
    many = [{"text": "x", "label": "a"}, *({"text": n, "label": "b"} for n in range(50))]
    file = write(tmp_path / "many.jsonl", lines(*many))
    with refused(DataError):
        read(file)
    alike = [{"text": "x", "label": "a" if n % 2 else None} for n in range(100)]
    with refused(DataError):
        read(write(file, lines(*alike)))


# Malformed files: name, content, and keys of the recipe

Content = str | bytes | Callable[[Path], object]
MALFORMED: dict[str, tuple[str, Content, dict]] = {}


def malformed(case: str, name: str, content: Content, **keys: object) -> None:
    assert case not in MALFORMED
    MALFORMED[case] = (name, content, keys)


malformed("empty file", "a.csv", "")
malformed("only blanks", "a.jsonl", "\n \n")
malformed("only a header", "a.csv", "text,label\n")
malformed("an empty array", "a.json", "[]")
malformed("another kind of file", "a.docx", "x")
malformed("no JSON", "a.jsonl", lines(*pairs("a", "b"), '{"text": "x"'))  # fmt: skip
malformed("a number a line", "a.jsonl", lines(*pairs("a", "b"), "17"))
malformed("an object in .json", "a.json", '{"text": "a", "label": 1}')
malformed("digits without end", "a.json", '[\n{"text": "a"},\n{"text": ' + "9" * 5000 + "}]")
malformed(
    "digits without end in a line",
    "a.jsonl",
    lines(*pairs("a", "b"), '{"text": ' + "9" * 5000 + "}"),
)
malformed("a line separator alone", "a.csv", "\u2028\n")
malformed("a text among objects", "a.json", '[{"text": "a"}, "b"]')
malformed(
    "Latin-1 in JSON",
    "a.jsonl",
    lines(*pairs("a", "b")).encode() + '{"text": "é", "label": "a"}'.encode("latin-1"),
)
malformed("Latin-1 in a CSV", "a.csv", "text,label\na,x\nb,y\ncafé,x\n".encode("latin-1"))
malformed("UTF-16", "a.csv", "text,label\na,x\n".encode("utf-16"))
malformed(
    "half a character", "a.jsonl", lines(*pairs("a", "b"), '{"text": "\\ud83d", "label": "a"}')
)
malformed("ragged lines", "a.csv", "text,label\na,x\nb,y,z\nc\nd,y\n")
malformed("an open quote", "a.csv", 'text,label\na,x\n"b, c,y\nc,x\n')
malformed("a column twice", "a.csv", "text,label,text\na,x,b\n")
malformed("a misspelt column", "a.csv", "txt,lable\na,x\n")
malformed("an output without its instruction", "a.csv", "conversatio,promt,output\na,b,x\n")
malformed("a column named wrongly", "a.csv", "text,stars\na,1\n", columns={"label": "star"})
malformed("a format without its column", "a.csv", "text,lable\na,1\n", format="regression")
malformed(
    "a column absent in a row", "a.jsonl", lines(*pairs("a", "b"), {"text": "c", "labl": "a"})
)
malformed("a number for a text", "a.jsonl", lines(*pairs("a", "b"), {"text": 7, "label": "a"}))
malformed(
    "a label of NaN",
    "a.jsonl",
    lines(*pairs(0.5, 1.5), '{"text": "x", "label": NaN}'),
    format="regression",
)
malformed(
    "a label that is no number",
    "a.csv",
    "text,label\na,1.5\nb,2.5\nc,three\nd,inf\n",
    format="regression",
)
malformed("booleans among words", "a.jsonl", lines(*pairs("a", "b", True)))
malformed("a missing word among numbers", "a.csv", "text,label\na,0.0\nb,1.0\nc,NaN\n")
malformed("preferences", "a.jsonl", lines({"prompt": "a", "chosen": "b", "rejected": "c"}))
malformed("liked answers", "a.jsonl", lines(GOOD_CHAT | {"label": True}))
malformed("pictures", "a.jsonl", lines(GOOD_CHAT | {"images": ["a.png"]}))
malformed("labels of two kinds", "a.jsonl", lines(*pairs("a", 1)))
malformed("one class", "a.csv", "text,label\na,x\nb,x\n")
malformed("many whole numbers", "a.csv", "text,label\n" + "".join(f"t,{n}\n" for n in range(60)))
malformed(
    "a label that is not listed",
    "a.csv",
    "text,label\na,good\nb,bad\nc,godo\n",
    labels=["bad", "good"],
)
malformed(
    "an unknown role",
    "a.jsonl",
    lines(GOOD_CHAT, chat(said("narrator", "Hi"), said("assistant", "b"))),
)
malformed("no assistant turn", "a.jsonl", lines(GOOD_CHAT, chat(said("user", "Hi"))))
malformed("no list of messages", "a.jsonl", lines(GOOD_CHAT, {"messages": "Hi"}))
malformed(
    "a message without content",
    "a.jsonl",
    lines(GOOD_CHAT, chat({"role": "user", "contents": "Hi"})),
)
malformed(
    "content that is a number",
    "a.jsonl",
    lines(GOOD_CHAT, chat(said("user", 7), said("assistant", "b"))),
)
malformed(
    "a Parquet row",
    "a.parquet",
    lambda path: save_parquet(path, [*pairs("a", "b"), {"text": "x", "label": None}]),
)
malformed("a broken archive", "a.jsonl.gz", gzip.compress(lines(*pairs("a", "b")).encode())[:-9])
malformed("too few rows", "a.jsonl", lines(*pairs("a", "b", "a")), held_out=9)


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_gives_its_one_sentence(case, tmp_path):
    name, content, keys = MALFORMED[case]
    file = tmp_path / name
    if callable(content):
        content(file)
    else:
        write(file, content)
    with refused(DataError):
        read(file, **keys)


def test_a_path_that_leads_nowhere_is_explained(tmp_path):
    write(tmp_path / "reviews.csv", "text,label\na,x\nb,y\n")
    with refused(DataError):
        read(tmp_path / "review.csv")
    write(tmp_path / "notes.csv", "text,label\na,x\nb,y\n")
    with refused(DataError):
        read(tmp_path)
    write(tmp_path / "train.csv", "text,label\na,x\nb,y\n")
    write(tmp_path / "train.jsonl", lines(*pairs("x", "y")))
    with refused(DataError):
        read(tmp_path)
    (tmp_path / "train.csv").unlink()
    write(tmp_path / "test.csv", "")
    write(tmp_path / "val.json", "{}")
    with refused(DataError):
        read(tmp_path)
    with refused(DataError, reason="(?<=hub: ).*"):
        read("nobody/nothing-at-all")
