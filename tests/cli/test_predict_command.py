"""`moc predict`: classes and probabilities of new rows, whatever batch they are in."""

import csv
import json
from pathlib import Path

import pytest
from support.rows import write_rows
from support.tiny_runs import train_on_rows

from moc_cli.cli import run
from moc_cli.data.custom.unlabelled import read_unlabelled
from moc_cli.recipe.names import ColumnsSection
from moc_cli.runs import RunFolder


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """A run on rows of two classes."""
    rows = [{"review": f"{'so ' * (n % 4)}{n}", "label": "ab"[n % 2]} for n in range(24)]
    home = tmp_path_factory.mktemp("classes")
    return train_on_rows(home, "bert", rows, columns={"text": "review"}, max_length=16)


def new_rows(folder: Path) -> Path:
    """A CSV of new rows, of several lengths, with a column that is nothing to the classifier."""
    path = folder / "new.csv"
    with path.open("w", newline="") as stream:
        rows = [(n, "very " * (n * 3) + "good") for n in range(7)]
        csv.writer(stream).writerows([("id", "review"), *rows])
    return path


def test_rows_keep_their_columns_and_get_class_and_probabilities(classes, tmp_path, capsys):
    command = ["predict", str(classes), "--file", str(new_rows(tmp_path))]
    assert run(command) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["id"] for row in rows] == [str(n) for n in range(7)]
    for row in rows:
        shares = row["probabilities"]
        assert list(shares) == ["a", "b"]
        assert sum(shares.values()) == pytest.approx(1)
        assert row["probability"] == shares[row["prediction"]] == max(shares.values())
    assert "rows are cut to 16 tokens, as in training" in printed.err
    output = tmp_path / "out.csv"
    assert run([*command, "--output-file", str(output)]) == 0
    with output.open(newline="") as stream:
        written = list(csv.DictReader(stream))
    assert [row["prediction"] for row in written] == [row["prediction"] for row in rows]
    assert float(written[3]["probability: b"]) == rows[3]["probabilities"]["b"]
    assert run([*command, "--output-file", str(tmp_path / "out.jsonl"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["rows"], answer["classes"]) == (7, ["a", "b"])
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_a_row_alone_gets_what_it_gets_in_a_batch(classes, tmp_path, capsys):
    answers = []
    for size in ("1", "7"):
        file = str(new_rows(tmp_path))
        assert run(["predict", str(classes), "--file", file, "--batch-size", size, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["predictions"]
        answers.append([row["probabilities"]["a"] for row in rows])
    assert answers[0] == pytest.approx(answers[1], abs=1e-6)


def test_a_regression_gives_values_of_pairs(tmp_path, capsys):
    rows = [{"sentence1": f"{n}", "sentence2": "b", "score": n % 4 + 0.5} for n in range(24)]
    values = train_on_rows(tmp_path, "bert", rows, max_length=16)
    capsys.readouterr()
    write_rows(tmp_path / "new.jsonl", [{"sentence1": "3", "sentence2": "b"}] * 2)
    assert run(["predict", str(values), "--file", str(tmp_path / "new.jsonl"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    first, second = answer["predictions"]
    assert isinstance(first["prediction"], float)
    assert "probabilities" not in first
    assert first["prediction"] == pytest.approx(second["prediction"], abs=1e-6)
    assert answer["classes"] is None


def test_the_columns_are_those_of_the_training(tmp_path, capsys):
    row = {"text": "x", "sentence1": "a", "sentence2": "b"}
    rows = [{"sentence1": f"{n}", "sentence2": "b", "label": "ab"[n % 2]} for n in range(24)]
    folder = train_on_rows(tmp_path, "bert", rows, max_length=16)
    recipe = RunFolder.open(folder).read_recipe(trust_remote_code=False)
    file = tmp_path / "new.csv"
    file.write_text("sentence1,sentence_2\na,b\n")
    capsys.readouterr()
    assert run(["predict", str(folder), "--file", str(file)]) == 2
    said = capsys.readouterr().err
    assert "lacks a column 'sentence2'; did you mean 'sentence_2'?" in said
    file = tmp_path / "new.jsonl"
    write_rows(file, [row])
    (example,) = (found := read_unlabelled(recipe.data, file)).examples
    assert (example.text_a, example.text_b, found.notes) == ("a", "b", [])
    single = recipe.data.columns.model_copy(update={"text": "text", "text_pair": None})
    found = read_unlabelled(recipe.data.model_copy(update={"columns": single}), file)
    assert (found.examples[0].text_a, found.examples[0].text_b) == ("x", None)
    assert found.notes == [f"{file}: not read: 'sentence2'; the run was trained on 'text' alone"]
    older = recipe.data.model_copy(update={"columns": ColumnsSection()})
    found = read_unlabelled(older, file)
    assert found.notes == [
        f"{file} is read by 'text', 'sentence2'; the run does not name the columns that it was "
        "trained on"
    ]


def test_what_cannot_be_predicted_is_refused_before_weights_load(
    classes, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("moc_cli.load_run.open_run", None)
    file, mine = tmp_path / "new.jsonl", tmp_path / "mine.csv"
    words = tmp_path / "words.jsonl"
    words.write_text('{"note": "a prediction"}\n')
    mine.write_text("years,model_prediction\nwork,1\n")
    cases = [
        (
            [{"review": "a"}],
            ["--output-file", str(mine)],
            "mine.csv was not written by `moc",
        ),
        (
            [{"review": "a"}],
            ["--output-file", str(file)],
            "new.jsonl was not written by `moc",
        ),
        (
            [{"review": "a"}],
            ["--output-file", str(words)],
            "words.jsonl was not written by `moc",
        ),
        ([{"review": "a", "by": "\ud800"}], [], "line 1: 'by' is not UTF-8"),
        ([{"review": "a", "by": ["\ud800"]}], [], "line 1: 'by' is not UTF-8"),
        ([{"revew": "a"}], [], "lacks a column 'review'; did you mean 'revew'?"),
        ([{"review": "a"}, {"review": " "}], [], "line 2: 'review' is empty"),
        ([{"review": "a"}, {"review": 3}], [], "line 2: 'review' is 3, not a text"),
        ([{"review": "a", "prediction": 1}], [], "has a column 'prediction' already"),
        ([{"review": "a"}], ["--output-file", "x.txt"], "give a name in .jsonl or .csv"),
    ]
    for rows, options, said in cases:
        write_rows(file, rows)
        assert run(["predict", str(classes), "--file", str(file), *options]) == 2
        assert said in capsys.readouterr().err
    latin = tmp_path / "latin.csv"
    latin.write_bytes("review,author\na,Zoë\n".encode("latin-1"))
    assert run(["predict", str(classes), "--file", str(latin)]) == 2
    assert "latin.csv, line 2: 'author' is not UTF-8" in capsys.readouterr().err
    assert run(["predict", str(classes), "--file", str(tmp_path / "nothing.csv")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert run(["generate", str(classes), "--prompt", "a"]) == 2
    assert f"moc predict {classes} --file FILE" in capsys.readouterr().err


def test_a_language_model_is_sent_to_generate(tmp_path, capsys):
    texts = train_on_rows(tmp_path, "llama", [{"text": f"abab {n}"} for n in range(24)])
    assert run(["predict", str(texts), "--file", str(new_rows(tmp_path))]) == 2
    assert "moc generate" in capsys.readouterr().err
