"""The table of messages: what is said and frozen must be the same, and of a test that exists."""

from pathlib import Path

import pytest
import yaml
from support.messages import TABLE, Messages, messages, refused

from moc_cli.errors import MocError

TEXT = """\
tests/test_messages.py:
  test_a[1]:
  - |-
    model '<tmp>/m' is damaged
    Hint: run: git lfs pull
  - |-
    second
"""


@pytest.fixture
def table(tmp_path: Path) -> Messages:
    (tmp_path / "table.yaml").write_text(TEXT)
    table = Messages(tmp_path / "table.yaml")
    table.temporary = "/tmp/pytest-3"
    table.start("tests/test_messages.py::test_a[1]")
    return table


def test_the_table_is_as_it_is_written_and_every_entry_is_of_a_test() -> None:
    table = Messages(TABLE)
    table.collected = messages.collected
    assert table.stale() == []
    assert table.dump() == TABLE.read_text(encoding="utf-8")


def test_what_is_frozen_is_said_in_its_order(table: Messages) -> None:
    table.add("model '/tmp/pytest-3/test_x_0/m' is damaged\nHint: run: git lfs pull")
    table.add("model '/tmp/pytest-3/test_y_1/m' is damaged\nHint: run: git lfs pull")
    with pytest.raises(AssertionError, match="not said.*second"):
        table.finish()
    table.add("second")
    table.finish()


def test_other_words_and_more_words_are_seen(table: Messages) -> None:
    with pytest.raises(AssertionError, match="another text is frozen"):
        table.add("model '<tmp>/m' is damaged")
    table.add("second")
    with pytest.raises(AssertionError, match="not frozen.*third"):
        table.add("third")


def test_a_test_that_is_gone_is_stale_and_not_written(table: Messages) -> None:
    assert table.stale() == ["tests/test_messages.py::test_a[1]"]
    here = "tests/test_messages.py::test_a_test_that_is_gone_is_stale_and_not_written"
    table.frozen = {f"{here}[1]": ["a"], f"{here}[2]": ["b"], "tests/gone.py::test_a": ["c"]}
    table.frozen["tests/export/test_static.py::TestRefused::test_nothing_to_freeze[1]"] = []
    assert table.stale() == ["tests/gone.py::test_a"]
    table.collected = {f"{here}[2]"}
    assert table.stale() == [f"{here}[1]", "tests/gone.py::test_a"]
    file, _, name = here.partition("::")
    assert yaml.safe_load(table.dump()) == {file: {f"{name}[2]": ["b"]}}


def test_what_a_library_says_must_be_there(table: Messages, monkeypatch) -> None:
    table.frozen[table.test] = ["no model: <reason>\nHint: look"]
    with monkeypatch.context() as patch:
        patch.setattr("support.messages.messages", table)
        with refused(MocError, reason="(?<=model: ).*nowhere.*"):
            raise MocError("no model: it is nowhere", "look")
        with pytest.raises(AssertionError, match="no reason like"), refused(MocError, reason="sky"):
            raise MocError("no model: it is nowhere", "look")
    table.finish()
