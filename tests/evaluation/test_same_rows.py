"""`moc eval` says which rows it scores: other ones than the training did, or trained ones."""

import json
import shutil
from pathlib import Path

import pytest
from support.rows import write_rows
from support.tiny_runs import train_on_rows

from moc_cli.cli import run
from moc_cli.data.examples import TextExample, fingerprint
from moc_cli.data.splits import TaskRows
from moc_cli.evaluation.same_rows import find_changed
from moc_cli.runs import RunFolder


def rows(count: int) -> list[dict]:
    return [{"text": f"abab {n}"} for n in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a run on rows of a file, four of them held out, two of them twice."""
    home = tmp_path_factory.mktemp("rows")
    method = {"name": "control", "rank": 2}
    train_on_rows(home, "llama", [*rows(12), *rows(2)], method, held_out=4)
    return home


@pytest.fixture
def evaluate(made, tmp_path, capsys, monkeypatch):
    """`evaluate(rows, *options)`: score the run when its file holds these rows."""
    monkeypatch.chdir(made)

    def call(content: list[dict], *options: str) -> tuple[str, dict]:
        before = (made / "rows.jsonl").read_text()
        write_rows(made / "rows.jsonl", content)
        capsys.readouterr()
        try:
            output = ["--output-dir", str(tmp_path / "scores"), "--json"]
            assert run(["eval", "run", *options, *output]) == 0
        finally:
            (made / "rows.jsonl").write_text(before)
        said = capsys.readouterr()
        return said.err, json.loads(said.out)["tasks"]["custom"]

    return call


def test_the_same_rows_need_no_word(evaluate, made):
    content = [*rows(12), *rows(2)]
    spelled = f"../{made.name}/rows.jsonl"
    for options in ([], ["--limit", "2"], ["--path", "rows.jsonl"], ["--path", spelled]):
        said, entry = evaluate(content, *options)
        assert "rows to score" not in said
        assert "trained_rows" not in entry
        assert entry["rows"] == 4


def test_a_file_that_grew_draws_other_rows_and_trained_ones_are_counted(evaluate):
    said, entry = evaluate([*rows(13), *rows(2)])
    assert "custom: the rows to score are not those of the training" in said
    assert entry["trained_rows"] > 0
    assert f"was trained on {entry['trained_rows']} of the 4 rows to score" in said


def test_rows_that_training_left_out_as_too_long_are_not_missed(made):
    folder = RunFolder.open(made / "run")
    task = TaskRows.draw("custom", [TextExample("custom", "a"), TextExample("custom", "b")], None)
    environment = folder.read_environment()
    part = {"rows": 1, "sha256": fingerprint(task.examples[:1])}
    copy = RunFolder(shutil.copytree(made / "run", made / "copy"))
    copy.write_environment(environment | {"data": environment["data"] | {"test custom": part}})
    assert list(find_changed(copy, [task], None, lambda examples: examples[:1])) == []
    assert "1 rows then, 2 now" in list(find_changed(copy, [task], None, list))[0]
    part = {"rows": 2, "sha256": fingerprint(task.examples)}
    copy.write_environment(environment | {"data": {"test custom": part}})
    assert list(find_changed(copy, [task], None, pytest.fail)) == []  # no row is tokenized


def test_a_copy_of_the_training_file_is_seen_through(evaluate, made, tmp_path):
    copy = shutil.copy(made / "rows.jsonl", tmp_path / "other.jsonl")
    said, entry = evaluate(rows(12), "--path", str(copy))
    assert entry["trained_rows"] >= 8
    assert "says nothing about new rows" in said
    write_rows(tmp_path / "new.jsonl", [{"text": "quite new"}])
    said, entry = evaluate(rows(12), "--path", str(tmp_path / "new.jsonl"))
    assert "rows to score" not in said
    assert "trained_rows" not in entry
