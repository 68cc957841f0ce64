"""Which recipe is that of a run: what its rows and files have told makes no other one."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.messages import refused
from support.rows import write_rows

from moc_cli.data.splits import read_splits
from moc_cli.errors import RunError
from moc_cli.recipe.load import dump, load_recipe
from moc_cli.recipe.paths import absolute_paths
from moc_cli.runs import RunFolder
from moc_cli.training.changes import check_recipe, is_finished

OWN = f"{'Answer with care. ' * 40}\n{{instruction}}\n"
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
DONE = {
    "format": 2,
    "status": "finished",
    "tasks": {},
    "protocol": "texts",
    "train_on_inputs": False,
    "steps": 300,
    "stopped": "finished",
    "tokens": 100,
    "seconds": 1.0,
    "memory": {"peak": 1, "kind": "peak resident"},
}


@pytest.mark.parametrize(
    ("row", "key", "written"),
    [
        ({"instruction": "a", "output": "b"}, "data.template", "own.txt"),
        (CHAT, "data.chat_template", "own.txt"),
        (CHAT, "data.chat_template", "chatml"),
    ],
)
def test_a_template_as_it_is_typed_is_the_text_in_the_run(
    tmp_path: Path, monkeypatch, row: dict[str, Any], key: str, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.txt").write_text(OWN)
    write_rows(Path("rows.jsonl"), [row | {"number": n} for n in range(4)])
    changes = ["data.suite=custom", "data.path=rows.jsonl", "data.tasks=own", "data.held_out=0"]
    recipe = load_recipe("quickstart", [*changes, f"{key}={written}", "output.output_dir=run"])
    data, _ = read_splits(absolute_paths(recipe).data)
    run = RunFolder("run")
    run.path.mkdir()
    run.recipe_file.write_text(dump(recipe.model_copy(update={"data": data})))
    run.write_results(DONE)
    assert is_finished(recipe, run)
    saved, resumed = load_recipe(run.recipe_file), absolute_paths(load_recipe(run.recipe_file))
    assert check_recipe(saved.model_dump(mode="json"), resumed.model_dump(mode="json")) == []


def test_the_way_back_to_the_rows_a_step_is_told_where_nothing_else_differs() -> None:
    saved = load_recipe("quickstart").model_dump(mode="json")
    with refused(RunError):
        check_recipe(saved, saved, (2, 1))
    with refused(RunError):
        check_recipe(saved, json.loads(json.dumps(saved)) | {"seed": 7}, (2, 1))
