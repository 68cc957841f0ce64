"""Files and folders as they lie around: what is read of them, and the errors of damaged ones."""

import json
import os
import random
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import parquet
from support.messages import refused

from moc_cli.data.custom.parts import read_parts
from moc_cli.data.custom.rows import read_custom
from moc_cli.errors import DataError
from moc_cli.recipe.sections import DataSection

ROWS = [{"text": f"row {n}", "label": n % 2} for n in range(8)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def section(**keys: object) -> DataSection:
    return DataSection.model_validate({"suite": "custom", "held_out": 2, **keys})


def counts(**keys: object) -> dict[str, int]:
    return {part: len(table.rows) for part, table in read_parts(section(**keys)).items()}


def refuse(**keys: object) -> None:
    with refused(DataError):
        read_parts(section(**keys))


def save(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["rows.tsv", "rows.csv"])
def test_a_lone_quotation_mark_swallows_no_rows(name, tmp_path):
    mark = "\t" if name.endswith("tsv") else ","
    rows = [f"item {n}{mark}{n % 2}" for n in range(9)]
    rows[2] = '"' + rows[2]
    rows[6] = f'item 6"{mark}0'
    (tmp_path / name).write_text(f"text{mark}label\n" + "\n".join(rows) + "\n")
    table = read_parts(section(path=str(tmp_path / name)))["train"]
    assert len(table.rows) == 9
    assert table.rows[2][1] == {"text": '"item 2', "label": "0"}
    assert table.notes == [f"{tmp_path / name}: quotation marks are text; as CSV they would hide "
                           "4 rows"]  # fmt: skip


def test_a_name_that_a_folder_does_not_have_is_refused(tmp_path):
    """Otherwise training rows would be held out, and the file that was meant not be read."""
    (tmp_path / "rows").mkdir()
    for name in ("train", "val2"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text(LINES)
    path = str(tmp_path / "rows")
    assert counts(path=path, splits={"validation": "val2"}) == {"train": 8, "validation": 8}
    refuse(path=path, splits={"validation": "val_2"})
    refuse(path=path, config_name="main")
    file = f"{path}/train.jsonl"
    refuse(path=file, splits={"test": "val2"})
    refuse(path=file, config_name="main")
    (tmp_path / "lone").mkdir()
    (tmp_path / "lone" / "rows.jsonl").write_text(LINES)
    refuse(path=str(tmp_path / "lone"), splits={"validation": "val2"})
    assert counts(path=path, splits={"validation": "absent"}, validation=file)["validation"] == 8


def test_the_train_file_may_lie_elsewhere(tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "test.jsonl").write_text(LINES)
    (tmp_path / "own.jsonl").write_text(LINES * 2)
    found = counts(path=str(tmp_path / "rows"), train=str(tmp_path / "own.jsonl"))
    assert found == {"train": 16, "test": 8}


def test_quotes_at_the_start_of_a_text_are_text(tmp_path):
    file = tmp_path / "rows.tsv"
    file.write_text('text\tlabel\n"Wait" he said\t1\nb\t0\n')
    table = read_parts(section(path=str(file)))["train"]
    assert table.rows[0][1] == {"text": '"Wait" he said', "label": "1"}
    assert "quotation marks are text" in table.notes[0]
    refuse(path=str(file), quoting="csv")
    file.write_text('text\tlabel\n"a"\t1\n')
    assert read_parts(section(path=str(file)))["train"].rows[0][1]["text"] == "a"
    plain = read_parts(section(path=str(file), quoting="none"))["train"]
    assert plain.rows[0][1]["text"] == '"a"'


def test_quoted_names_of_columns_may_hold_the_separator(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text('"Review, text","Review, label"\na,1\nb,0\n')
    for quoting in ("csv", None):
        table = read_parts(section(path=str(file), quoting=quoting))["train"]
        assert table.columns == ["Review, text", "Review, label"]
    refuse(path=str(file), quoting="none")


def test_json_is_read_whatever_its_name(tmp_path):
    (tmp_path / "lines.json").write_text(LINES)
    (tmp_path / "array.jsonl").write_text(json.dumps(ROWS))
    (tmp_path / "wrapped.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    for name in ("lines.json", "array.jsonl", "wrapped.json"):
        table = read_parts(section(path=str(tmp_path / name)))["train"]
        assert [row for _, row in table.rows] == ROWS
    assert table.notes == [f"{tmp_path / 'wrapped.json'}: its rows are under 'data'; not read: "
                           "version"]  # fmt: skip


def test_only_a_line_feed_ends_a_line_of_json(tmp_path):
    rows = [{"text": "a\u2028b\x85c"}, {"text": "d"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text(text)
    table = read_parts(section(path=str(tmp_path / "rows.jsonl")))["train"]
    assert [row for _, row in table.rows] == rows


def test_each_line_of_a_plain_text_is_a_row(tmp_path):
    (tmp_path / "book.txt").write_text("one\n\ntwo\n")
    rows = read_custom(section(path=str(tmp_path / "book.txt"), held_out=1))
    assert rows.format == "text"
    assert rows.dropped == {"train": {"a blank line": 1}}


def test_folders_as_the_hub_lays_them_out(tmp_path):
    for number in range(2):
        save(tmp_path / "hub" / "data" / f"train-0000{number}-of-00002.parquet", ROWS[:4])
    save(tmp_path / "hub" / "data" / "test-00000-of-00001.parquet", ROWS[:3])
    assert counts(path=str(tmp_path / "hub")) == {"train": 8, "test": 3}
    assert counts(path=str(tmp_path / "hub" / "data")) == {"train": 8, "test": 3}
    (tmp_path / "hub" / "data" / "train-00001-of-00002.parquet").unlink()
    refuse(path=str(tmp_path / "hub"))
    save(tmp_path / "split" / "train" / "a.parquet", ROWS)
    save(tmp_path / "split" / "valid" / "a.parquet", ROWS[:2])
    assert counts(path=str(tmp_path / "split")) == {"train": 8, "validation": 2}
    save(tmp_path / "lone" / "reviews.parquet", ROWS)
    assert counts(path=str(tmp_path / "lone")) == {"train": 8}
    save(tmp_path / "configs" / "main" / "train.parquet", ROWS)
    refuse(path=str(tmp_path / "configs"))
    assert counts(path=str(tmp_path / "configs"), config_name="main") == {"train": 8}


def test_parts_may_have_files_of_any_name(tmp_path):
    for name, count in (("a", 8), ("b", 3), ("c", 2)):
        save(tmp_path / f"{name}.parquet", ROWS[:count])
    train, watched, scored = (str(tmp_path / f"{name}.parquet") for name in "abc")
    found = counts(train=train, validation=watched, test=scored)
    assert found == {"train": 8, "validation": 3, "test": 2}
    assert counts(path=train, test=scored) == {"train": 8, "test": 2}
    refuse(path=train, test=scored + "x")


def test_files_beside_the_one_of_a_part_are_named(tmp_path):
    inside = tmp_path / "train"
    save(inside / "train.parquet", ROWS)
    save(inside / "more.parquet", ROWS)
    assert counts(path=str(tmp_path)) == {"train": 16}
    save(tmp_path / "train.parquet", ROWS)
    save(tmp_path / "train_2.parquet", ROWS)
    table = read_parts(section(path=str(tmp_path)))["train"]
    assert len(table.rows) == 8
    assert table.notes == [
        f"{tmp_path / 'train.parquet'} is all of train; not read: train/more.parquet, "
        "train/train.parquet, train_2.parquet"
    ]


def test_datasets_that_were_saved_and_splits_by_name(tmp_path):
    made = datasets.DatasetDict(
        {
            "train_sft": datasets.Dataset.from_list(ROWS),
            "test": datasets.Dataset.from_list(ROWS[:2]),
        }
    )
    made.save_to_disk(str(tmp_path / "saved"))
    path = str(tmp_path / "saved")
    refuse(path=path)
    assert counts(path=path, splits={"train": "train_sft"}) == {"train": 8, "test": 2}
    refuse(path=path, splits={"train": "train_sf"})
    made["test"].save_to_disk(str(tmp_path / "one"))
    one = str(tmp_path / "one")
    assert counts(path=one) == {"train": 2}
    refuse(path=one, splits={"validation": "test"})
    names = {"splits": {"train": "train_sft"}, "config_name": "main"}
    assert set(read_parts(section(path=one, **names), to_score=True)) == {"train"}
    refuse(path=path, splits={"train": "train_sft"}, config_name="main")


def test_a_configuration_of_a_hub_id_reaches_datasets(tmp_path, monkeypatch):
    calls = []

    def load(*arguments: object, **options: object) -> datasets.DatasetDict:
        calls.append((arguments, options))
        if arguments[1] is None:
            raise ValueError("Config name is missing.\nPlease pick one: ['main', 'socratic']")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert counts(path="someone/rows", config_name="main") == {"train": 8}
    assert calls == [(("someone/rows", "main"), {})]
    refuse(path="someone/rows")


# Damage


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Return a file with some bytes changed, doubled, cut off, or replaced by odd ones."""
    odd = [b'"', b"\x00", b"\xff", b"\xe2\x80\xa8", b"[" * 3000, b"9" * 5000, b"\n", b"\t,", b"NaN"]
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(raw) + 1)
        end = min(len(raw), start + rng.choice([0, 1, 3, 40]))
        middle = rng.choice([b"", rng.choice(odd), rng.randbytes(3), raw[start:end] * 2])
        raw = raw[:start] + middle + raw[end:]
    return raw


def test_a_damaged_file_ends_in_a_sentence(tmp_path):
    """Damaged files of each kind, `MOC_FUZZ` of them; any error but ours fails the test."""
    save(tmp_path / "good.parquet", ROWS)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    asked = {"instruction": "Add", "input": "1", "output": "2", "history": [["a", "b"]]}
    table = "text{0}label\n" + "".join(f"row {n}{{0}}{n % 2}\n" for n in range(8))
    good = {
        "csv": table.format(",").encode(),
        "tsv": table.format("\t").encode(),
        "jsonl": LINES.encode(),
        "json": json.dumps(ROWS).encode(),
        "parquet": (tmp_path / "good.parquet").read_bytes(),
        "arrow": next((tmp_path / "saved").glob("*.arrow")).read_bytes(),
        "chat.jsonl": (json.dumps({"messages": turns, "tools": [{"name": "f"}]}) + "\n").encode()
        * 6,
        "asked.jsonl": (json.dumps(asked) + "\n").encode() * 6,
    }
    messages = []
    for number in range(int(os.environ.get("MOC_FUZZ", "60"))):
        suffix = list(good)[number % len(good)]
        file = tmp_path / f"bad.{suffix}"
        file.write_bytes(mutated(good[suffix], random.Random(number)))
        try:
            read_custom(section(path=str(file)))
        except DataError as error:
            messages.append(error.message)
        except Exception as error:
            pytest.fail(f"mutation {number} of {suffix}: {error!r}")
    assert len(messages) > 20
    assert all("bad." in message or "hold out" in message for message in messages)


def test_a_duration_in_parquet_is_told(tmp_path):
    long = pyarrow.array([2**62], pyarrow.duration("s"))
    parquet.write_table(pyarrow.table({"text": ["a"], "took": long}), tmp_path / "a.parquet")
    with refused(DataError, reason="(?<=as Parquet: ).*"):
        read_parts(section(path=str(tmp_path / "a.parquet")))


def test_a_broken_parquet_file_is_told(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with refused(DataError, reason="Parquet magic bytes.*"):
        read_parts(section(path=str(tmp_path / "a.parquet")))


# Files as users have them


def test_files_that_cannot_be_read_say_what_to_do(tmp_path):
    def lines(row: dict) -> Path:
        path = tmp_path / "rows.jsonl"
        path.write_text((json.dumps(row) + "\n") * 8)
        return path

    def refuse(path: Path) -> None:
        with refused(DataError):
            read_custom(section(path=str(path)))

    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\ncaf\u00e9,a\ntea,b\n".encode("latin-1"))
    refuse(latin)
    bare = tmp_path / "bare.tsv"
    bare.write_text("ham\tHello\nspam\tWin\n")
    refuse(bare)
    refuse(
        lines({"context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}})
    )
    refuse(lines({"text": "t", "role": "prompter", "parent_id": None}))
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    refuse(tmp_path / "rows.xlsx")


def test_files_of_spreadsheets_and_competitions(tmp_path):
    text = "text;label\r\n" + "".join(f'"caf\u00e9; {n}";{n % 2}\r\n' for n in range(8))
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    rows = read_custom(section(path=str(tmp_path / "a.csv")))
    assert (rows.train[0].text_a[:5], rows.labels) == ("caf\u00e9;", [0, 1])
    kaggle = tmp_path / "kaggle"
    kaggle.mkdir()
    train = "".join(f"{n},,text {n},{n % 2}\n" for n in range(8))
    (kaggle / "train.csv").write_text(f"id,keyword,text,target\n{train}")
    (kaggle / "test.csv").write_text("id,keyword,text\n1,,a\n")
    (kaggle / "sample_submission.csv").write_text("id,target\n1,0\n")
    (note,) = read_custom(section(path=str(kaggle))).notes
    assert note.endswith("--set data.columns.label=NAME, of 'target'")
    rows = read_custom(section(path=str(kaggle), columns={"label": "target"}))
    assert (rows.format, len(rows.train), len(rows.test)) == ("classification", 6, 2)
