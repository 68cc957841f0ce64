"""What the table of tasks says of a kind without torch agrees with its object."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from support.messages import refused

from moc_cli.errors import DataError
from moc_cli.kinds import KINDS, make_kind
from moc_cli.recipe.sections import DataSection
from moc_cli.recipe.tasks import FORMATS, HEADS, TASKS, UNKNOWN
from moc_cli.scoring.loss import TextScore

BENCHMARKS = [(suite, name, None) for suite, tasks in TASKS.items() for name in tasks]
CUSTOM = [("custom", "mine", format_) for format_ in FORMATS]


def section(suite: str, task: str, format_: str | None) -> DataSection:
    values = {"suite": suite, "tasks": [task], "format": format_, "labels": ["bad", "good"]}
    return DataSection.model_validate(values)


@pytest.mark.parametrize(("suite", "task", "format_"), BENCHMARKS + CUSTOM)
def test_a_task_is_learned_and_scored_as_the_table_says(
    suite: str, task: str, format_: str | None
) -> None:
    data = section(suite, task, format_)
    loaded = make_kind(data.task).model_arguments()
    assert data.kind.head is HEADS[loaded["kind"]]
    assert loaded.get("num_labels", 0) == (data.task.num_labels if data.kind.classifier else 0)
    assert {*data.kind.generating} <= {*data.kind.protocols}
    assert data.kind.protocol("rank") in data.kind.protocols


def test_every_kind_of_the_table_has_its_class() -> None:
    tasks = [task for table in (*TASKS.values(), FORMATS) for task in table.values()]
    assert {task.kind.name for task in tasks} == set(KINDS)


def test_a_perplexity_beyond_all_numbers_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that a high rate has damaged may have such a loss, during training and after it."""
    kind: Any = make_kind(section("custom", "mine", "text").task)
    for loss in (2.0, 800.0):
        found = SimpleNamespace(loss=loss)
        monkeypatch.setattr(type(kind), "answer_loss", lambda *_, found=found: found)
        expected = math.exp(loss) if loss < 700 else math.inf
        assert kind.watch(None, [], None) == {"loss": loss, "perplexity": expected}
        assert kind.measure([TextScore(2 * loss, 2)], [])["perplexity"].value == expected


def test_before_its_rows_are_read_a_custom_dataset_may_be_anything() -> None:
    data = section("custom", "mine", None)
    assert data.task is UNKNOWN
    assert data.kind.head is None
    assert all(data.kind.protocol(name) == name for name in data.kind.protocols)
    with refused(DataError):
        make_kind(data.task)
