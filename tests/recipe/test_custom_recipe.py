"""The recipe for a custom dataset: its defaults, its metrics, its schema."""

import pytest
from support.messages import refused

from moc_cli.errors import RecipeError
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.reference import json_schema

MINIMAL = """model: {model_name_or_path: some/model}
output: {output_dir: run}
"""


@pytest.fixture
def recipe(tmp_path):
    def load(data: str, *overrides: str, more: str = ""):
        path = tmp_path / "r.yaml"
        path.write_text(f"{MINIMAL}data: {data}\n{more}")
        return load_recipe(path, overrides)

    return load


def refuse(load, data: str, *overrides: str, more: str = "") -> None:
    with refused(RecipeError):
        load(data, *overrides, more=more)


def test_a_custom_dataset_needs_only_a_path(recipe):
    data = recipe("{suite: custom, path: rows.csv}").data
    assert (data.tasks, data.train_on_inputs, data.format, data.labels) == (
        ["custom"],
        False,
        None,
        None,
    )
    named = recipe("{suite: custom, path: rows.csv, tasks: mine, train_on_inputs: true}").data
    assert (named.tasks, named.train_on_inputs) == (["mine"], True)
    switched = recipe(
        "{suite: builtin, tasks: [world]}", "data.suite=custom", "data.tasks=x", "data.path=a/b"
    )
    assert switched.data.tasks == ["x"]


def test_labels_may_be_words_or_numbers(recipe):
    assert recipe("{suite: custom, path: p, labels: [no, yes]}").data.labels == ["no", "yes"]
    assert recipe("{suite: custom, path: p, labels: [1, 0]}").data.labels == [1, 0]


def test_a_format_has_its_own_metrics(recipe):
    data = "{suite: custom, path: p, format: regression}"
    for metric in ("pearson", "spearman", "loss"):
        recipe(data, f"eval.metric_for_best_model={metric}")
    refuse(recipe, data, "eval.metric_for_best_model=accuracy")
    recipe("{suite: custom, path: p}", "eval.metric_for_best_model=perplexity")
    refuse(recipe, "{suite: glue, tasks: rte}", "eval.metric_for_best_model=perplexity")


def test_settings_per_task_know_the_name_of_a_custom_dataset(recipe):
    more = "per_task:\n  mine: {train: {max_steps: 7}}\n"
    assert recipe("{suite: custom, path: p, tasks: mine}", more=more).train.max_steps == 7
    more = more.replace("mine", "custom")
    assert recipe("{suite: custom, path: p}", more=more).train.max_steps == 7
    refuse(recipe, "{suite: custom, path: p, tasks: mine}", more=more)


def test_the_schema_requires_tasks_of_benchmarks_only():
    data = json_schema()["$defs"]["DataSection"]
    assert data["required"] == ["suite"]
    assert data["anyOf"] == [
        {"properties": {"suite": {"const": "custom"}}},
        {"required": ["tasks"]},
    ]
    assert set(data["properties"]["suite"]["enum"]) == {"commonsense", "glue", "builtin", "custom"}


def test_a_template_is_for_instructions_and_the_chat_template_for_it(recipe):
    start = "suite: custom, path: p, "
    refuse(recipe, f"{{{start}format: chat, template: plain}}")
    keys = "format: instruction, chat_template: chatml, merge_system: true"
    refuse(recipe, f"{{{start}{keys}}}")
    assert recipe(f"{{{start}{keys}, template: chat}}").data.frame == "chat"
    assert recipe(f"{{{start}format: instruction, template: plain}}").data.frame == "instruction"
    refuse(recipe, "{suite: glue, tasks: rte, template: plain}")
