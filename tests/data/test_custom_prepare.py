"""Names of classes that a dataset brings, and conversations as prompt and completion."""

import json

import datasets
import pytest
from support.messages import refused

from moc_cli.data.custom.rows import CustomRows, read_custom, read_scored
from moc_cli.errors import DataError
from moc_cli.recipe.sections import DataSection


def section(path, **keys: object) -> DataSection:
    data = {"suite": "custom", "path": str(path), "held_out": 0, **keys}
    return DataSection.model_validate(data)


def named() -> datasets.Dataset:
    names = datasets.ClassLabel(names=["pos", "neg", "mixed"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    return datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, 0, 1]}, features)


@pytest.mark.parametrize("kind", ["saved", "arrow", "parquet"])
def test_class_names_of_the_dataset_are_the_classes(tmp_path, kind):
    path = tmp_path / kind
    named().save_to_disk(path)
    if kind == "arrow":
        path = next(path.glob("*.arrow"))
    if kind == "parquet":
        path = tmp_path / "rows.parquet"
        named().to_parquet(path)
    rows: CustomRows = read_custom(section(path))
    assert rows.labels == ["pos", "neg", "mixed"]
    assert [row.label for row in rows.train] == [1, 0, 1]
    assert rows.taken["why"] == "the dataset names its classes"
    # The recipe of a run holds the names; numbers in a recipe go with the numbers of the rows.
    scored, _ = read_scored(section("elsewhere", labels=rows.labels), str(path))
    assert [row.label for row in scored] == [1, 0, 1]
    swapped = read_custom(section(path, labels=[1, 0]))
    assert [row.label for row in swapped.train] == [0, 1, 0]


def test_prompt_and_completion_of_messages_are_one_conversation(tmp_path):
    path = tmp_path / "trl.jsonl"
    prompt = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    completion = [{"role": "assistant", "content": "yes"}]
    row = {"prompt": prompt, "completion": completion, "tools": []}
    path.write_text(json.dumps(row) + "\n")
    rows = read_custom(section(path))
    (chat,) = rows.train
    assert [role for role, _ in chat.messages] == ["user", "assistant", "user", "assistant"]
    assert chat.unlearned == (1,)
    assert "only the completion is learned" in rows.notes[0]
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"prompt": "Hi"}) + "\n")
    with refused(DataError):
        read_custom(section(path))
