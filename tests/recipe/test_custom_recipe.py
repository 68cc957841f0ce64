"""The recipe of a run on one's own rows: what it leaves out, refuses, and says in its schema."""

import pytest

from moc_cli.errors import RecipeError
from moc_cli.recipe.load import json_schema, load_recipe

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


def refused(load, data: str, *overrides: str, more: str = "") -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(data, *overrides, more=more)
    return [f"{problem.key}: {problem.message}" for problem in caught.value.problems]


def test_own_rows_need_only_a_path(recipe):
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


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (
            "{suite: custom}",
            "data.path: suite 'custom' needs the path of your rows: a file, a folder or a hub id",
        ),
        (
            "{suite: custom, path: p, tasks: [a, b]}",
            "data.tasks: custom trains one task a run, found 2",
        ),
        (
            "{suite: custom, path: p, tasks: mrpc}",
            "data.tasks.0: 'mrpc' is a benchmark's task; give your own another name",
        ),
        (
            "{suite: custom, path: p, format: chats}",
            "data.format: found 'chats'; did you mean 'chat'? "
            "allowed: instruction, chat, text, classification, regression, null",
        ),
        (
            "{suite: custom, path: p, columns: {lable: x}}",
            "data.columns.lable: unknown key; did you "
            "mean 'label'? allowed: text, text_pair, label, instruction, input, output, messages",
        ),
        (
            "{suite: custom, path: p, format: chat, columns: {text: x}}",
            "data.columns.text: format 'chat' reads no such column; it reads messages",
        ),
        (
            "{suite: custom, path: p, format: text, labels: [a, b]}",
            "data.labels: labels are for format 'classification', data.format is 'text'",
        ),
        ("{suite: custom, path: p, labels: [a, a]}", "data.labels: label 'a' is listed twice"),
        (
            "{suite: glue}",
            "data.tasks: missing, and it has no default (task names; one for glue; for "
            "custom any name, by default 'custom'); allowed: a list of texts",
        ),
        (
            "{suite: glue, tasks: rte, format: text}",
            "data.format: only suite 'custom' reads this key, data.suite is 'glue'",
        ),
        (
            "{suite: glue, tasks: rte, columns: {text: x}}",
            "data.columns: only suite 'custom' reads this key, data.suite is 'glue'",
        ),
    ],
)
def test_what_cannot_work_is_refused(recipe, data, problem):
    assert refused(recipe, data) == [problem]


def test_a_format_has_its_own_metrics(recipe):
    data = "{suite: custom, path: p, format: regression}"
    for metric in ("pearson", "spearman", "loss"):
        recipe(data, f"eval.metric_for_best_model={metric}")
    (problem,) = refused(recipe, data, "eval.metric_for_best_model=accuracy")
    assert problem.endswith("format 'regression' has no accuracy; allowed: pearson, spearman, loss")
    recipe("{suite: custom, path: p}", "eval.metric_for_best_model=perplexity")
    (problem,) = refused(
        recipe, "{suite: glue, tasks: rte}", "eval.metric_for_best_model=perplexity"
    )
    assert "task 'rte' has no perplexity" in problem


def test_settings_per_task_know_the_own_name(recipe):
    more = "per_task:\n  mine: {train: {max_steps: 7}}\n"
    assert recipe("{suite: custom, path: p, tasks: mine}", more=more).train.max_steps == 7
    more = more.replace("mine", "custom")
    assert recipe("{suite: custom, path: p}", more=more).train.max_steps == 7
    (problem,) = refused(recipe, "{suite: custom, path: p, tasks: mine}", more=more)
    assert "unknown task" in problem


def test_the_schema_wants_tasks_of_benchmarks_only():
    data = json_schema()["$defs"]["DataSection"]
    assert data["required"] == ["suite"]
    assert data["anyOf"] == [
        {"properties": {"suite": {"const": "custom"}}},
        {"required": ["tasks"]},
    ]
    assert set(data["properties"]["suite"]["enum"]) == {"commonsense", "glue", "builtin", "custom"}
