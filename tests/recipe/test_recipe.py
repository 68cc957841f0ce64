"""Recipes: what is read, what is refused and in which words, overrides, the round trip."""

import math
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import yaml
from support.machine import ROOT

from moc_cli.errors import RecipeError
from moc_cli.recipe.load import dump, load_recipe
from moc_cli.recipe.methods import METHODS
from moc_cli.recipe.reader import parse_scalar, read_yaml
from moc_cli.recipe.reference import Key, json_schema, keys
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import nearest
from moc_cli.training.resume import check_recipe

GOOD = """\
model:
  model_name_or_path: builtin:world-llama
method:
  name: moc
  rank: 16
data:
  suite: builtin
  tasks: [world]
train:
  max_steps: 20
eval:
  before: true
output:
  output_dir: runs/x
launch:
  device: cpu
"""
MINIMAL = {
    "model": {"model_name_or_path": "m"},
    "data": {"suite": "glue", "tasks": ["rte"]},
    "output": {"output_dir": "o"},
}
SECTIONS = "seed, model, method, data, train, eval, output, launch, per_task"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, so that messages name `r.yaml` alone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str, *overrides: str) -> Recipe:
    """Load a recipe of this text."""
    Path("r.yaml").write_text(text, encoding="utf-8")
    return load_recipe("r.yaml", overrides)


def lines(text: str, *overrides: str) -> list[str]:
    """Load a broken recipe and return its lines of complaint."""
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return caught.value.message.split("\n")


def change(old: str, new: str) -> str:
    """Return the good recipe with one piece of text exchanged."""
    assert old in GOOD
    return GOOD.replace(old, new)


# (text of the recipe, overrides, the beginning of each line of the error, in order)
MISTAKES: list[tuple[str, tuple[str, ...], list[str]]] = [
    # Keys
    (
        change("train:", "trian:"),
        (),
        ["r.yaml:9: trian: unknown key; did you mean 'train'? allowed: " + SECTIONS],
    ),
    (
        change("max_steps: 20", "lr: 1.0e-3"),
        (),
        ["r.yaml:10: train.lr: unknown key; did you mean 'learning_rate'? allowed: num_train_"],
    ),
    (
        change("device: cpu", "learning_rate: 1.0e-3"),
        (),
        ["r.yaml:16: launch.learning_rate: unknown key; it belongs under 'train'; allowed here: "],
    ),
    (
        change("before: true", "zzz: true"),
        (),
        ["r.yaml:12: eval.zzz: unknown key; allowed: per_device_eval_batch_size, "],
    ),
    (
        change("name: moc", "name: control\n  top_k: 2"),
        (),
        ["r.yaml:5: method.top_k: method 'control' has no such key (it belongs to moc); allowed: "],
    ),
    (
        change("rank: 16", "gate:\n    knd: linear"),
        (),
        ["r.yaml:6: method.gate.knd: unknown key; did you mean 'kind'? allowed: kind, "],
    ),
    (
        change("rank: 16", "rank: x\n  rank: 8"),
        (),
        [
            "r.yaml:5: method.rank: found 'x'; allowed: a whole number of at least 1",
            "r.yaml:6: method.rank: given twice, in lines 5 and 6; keep one",
        ],
    ),
    (
        GOOD + "data:\n  suite: glue\n",
        (),
        ["r.yaml:17: data: given twice, in lines 6 and 17; keep one"],
    ),
    (GOOD + "? [a, b]\n: 1\n", (), ["r.yaml:17: a key must be a text"]),
    (
        change("device: cpu", "num_processes: 4"),
        (),
        ["r.yaml:16: launch.num_processes: unknown key; allowed: device, num_threads"],
    ),
    # Missing
    (
        change("  model_name_or_path: builtin:world-llama\n", "  revision: main\n"),
        (),
        ["r.yaml:1: model.model_name_or_path: missing, and it has no default (hub id, "],
    ),
    (
        change("output:\n  output_dir: runs/x\n", ""),
        (),
        ["r.yaml: output: missing section; it needs output_dir"],
    ),
    (
        change("output:\n  output_dir: runs/x\n", "output:\n"),
        (),
        ["r.yaml:13: output.output_dir: missing, and it has no default (the run folder)"],
    ),
    (change("  name: moc\n", ""), (), ["r.yaml:3: method.name: missing; allowed: moc, control"]),
    (
        change("rank: 16", "placement: {layers: h, attn: {read: a, write: b}, causal: true}"),
        (),
        ["r.yaml:5: method.placement.ffn: missing section; it needs read, write"],
    ),
    # Values
    (
        change("name: moc", "name: mocc"),
        (),
        ["r.yaml:4: method.name: found 'mocc'; did you mean 'moc'? allowed: moc, control"],
    ),
    (
        change("method:\n  name: moc\n  rank: 16\n", "method: contorl\n"),
        (),
        ["r.yaml:3: method: found 'contorl'; did you mean 'control'? allowed: moc, control"],
    ),
    (change("name: moc", "name: 3"), (), ["r.yaml:4: method.name: found 3; allowed: moc, control"]),
    (
        change("device: cpu", "device: cuad"),
        (),
        ["r.yaml:16: launch.device: found 'cuad'; did you mean 'cuda'? allowed: auto, cpu, cuda"],
    ),
    (
        change("before: true", "metric_for_best_model: acuracy"),
        (),
        [
            "r.yaml:12: eval.metric_for_best_model: found 'acuracy'; did you mean 'accuracy'? "
            "allowed: loss, accuracy, f1, matthews, pearson, spearman, perplexity, null"
        ],
    ),
    (
        change("rank: 16", "rank:"),
        (),
        ["r.yaml:5: method.rank: found nothing; allowed: a whole number of at least 1"],
    ),
    (
        change("rank: 16", "alpha: 1.5"),
        (),
        ["r.yaml:5: method.alpha: found 1.5; allowed: a number from 0 to 1"],
    ),
    (
        change("max_steps: 20", "adam_beta2: 1.0"),
        (),
        ["r.yaml:10: train.adam_beta2: found 1.0; allowed: a number of at least 0 and below 1"],
    ),
    (
        change("max_steps: 20", "learning_rate: nan"),
        (),
        ["r.yaml:10: train.learning_rate: found 'nan'; allowed: a number above 0"],
    ),
    (
        change("max_steps: 20", "learning_rate: 1e999"),
        (),
        ["r.yaml:10: train.learning_rate: found inf; allowed: a number above 0"],
    ),
    (
        change("output_dir: runs/x", "output_dir: ''"),
        (),
        ["r.yaml:14: output.output_dir: found ''; allowed: a text that is not empty"],
    ),
    (
        change("data:\n  suite: builtin\n  tasks: [world]\n", "data: glue\n"),
        (),
        ["r.yaml:6: data: found 'glue'; allowed: a section with the keys suite, tasks, path, "],
    ),
    (
        change("tasks: [world]", "tasks: []"),
        (),
        ["r.yaml:8: data.tasks: found an empty list; allowed: a list of texts"],
    ),
    (
        change("tasks: [world]", "tasks:\n    - 3"),
        (),
        ["r.yaml:9: data.tasks.0: found 3; allowed: a text that is not empty"],
    ),
    (
        change("output_dir: runs/x", "output_dir: runs/x\n  report_to: [tensorbord]"),
        (),
        [
            "r.yaml:15: output.report_to.0: found 'tensorbord'; did you mean 'tensorboard'? "
            "allowed: tensorboard, wandb, trackio"
        ],
    ),
    (
        change("max_steps: 20", "max_steps: 0"),
        (),
        ["r.yaml:10: train.max_steps: found 0; allowed: -1 (as many as num_train_epochs gives) or"],
    ),
    (
        change("builtin:world-llama", "builtin:world-lama"),
        (),
        [
            "r.yaml:2: model.model_name_or_path: found 'builtin:world-lama'; did you mean "
            "'builtin:world-llama'? allowed: builtin:world-llama"
        ],
    ),
    # Combinations
    (
        change("suite: builtin\n  tasks: [world]", "suite: commonsense\n  tasks: [ARC_Easy]"),
        (),
        [
            "r.yaml:8: data.tasks.0: suite 'commonsense' has no task 'ARC_Easy'; did you mean "
            "'ARC-Easy'? allowed: boolq, piqa, social_i_qa, "
        ],
    ),
    (
        change("suite: builtin\n  tasks: [world]", "suite: glue\n  tasks: [mrpc, rte]"),
        (),
        ["r.yaml:8: data.tasks: glue trains one task per run, found 2"],
    ),
    (
        change("suite: builtin\n  tasks: [world]", "suite: commonsense\n  tasks: [piqa, piqa]"),
        (),
        ["r.yaml:8: data.tasks.1: task 'piqa' is listed twice"],
    ),
    (
        change("tasks: [world]", "tasks: [world]\n  path: data"),
        (),
        ["r.yaml:9: data.path: suite 'builtin' is inside this package; leave data.path out"],
    ),
    (
        change("max_steps: 20", "warmup_steps: 5\n  warmup_ratio: 0.1"),
        (),
        ["r.yaml:11: train.warmup_ratio: warmup_steps (5) and warmup_ratio (0.1) both set the "],
    ),
    (
        change("before: true", "eval_strategy: steps"),
        (),
        ["r.yaml:12: eval.eval_strategy: eval_strategy 'steps' needs eval.eval_steps"],
    ),
    (
        change("before: true", "early_stopping_patience: 3"),
        (),
        ["r.yaml:12: eval.early_stopping_patience: early stopping needs evaluation during "],
    ),
    (
        change(
            "suite: builtin\n  tasks: [world]",
            "suite: commonsense\n  tasks: [piqa]\n  held_out: 0",
        ),
        ("eval.eval_strategy=epoch",),
        ["r.yaml:9: data.held_out: evaluation during training needs held-out rows, found 0"],
    ),
    (
        change("suite: builtin\n  tasks: [world]", "suite: glue\n  tasks: [cola]"),
        ("eval.metric_for_best_model=pearson", "eval.protocol=generate"),
        [
            "--set eval.metric_for_best_model=pearson: eval.metric_for_best_model: task 'cola' has "
            "no pearson; allowed: matthews, loss",
            "--set eval.protocol=generate: eval.protocol: a task of classification generates no ",
        ],
    ),
    (
        change("world-llama", "world-llama\n  attn_implementation: flash_attention_2"),
        (),
        ["r.yaml:3: model.attn_implementation: flash_attention_2 needs a GPU, launch.device is "],
    ),
    (
        change("world-llama", "world-llama\n  attn_implementation: flash_attention_2"),
        ("launch.device=cuda",),
        ["r.yaml:3: model.attn_implementation: flash_attention_2 needs train.bf16: true"],
    ),
    # Custom datasets
    (
        GOOD,
        ("data={suite: custom}",),
        ["--set data={suite: custom}: data.path: suite 'custom' needs the path of the dataset: "],
    ),
    (
        GOOD,
        ("data.suite=custom", "data.path=p", "data.tasks=mrpc"),
        [
            "--set data.tasks=mrpc: data.tasks.0: 'mrpc' is the name of a benchmark task; give "
            "this task another name"
        ],
    ),
    (
        GOOD,
        ("data={suite: custom, path: p, tasks: [a, b]}",),
        ["--set data={suite: custom, path: p, tasks: [a, b]}: data.tasks: custom trains one task "],
    ),
    (
        GOOD,
        ("data={suite: custom, path: p}", "data.columns.lable=x"),
        ["--set data.columns.lable=x: data.columns.lable: unknown key; did you mean 'label'? "],
    ),
    (
        GOOD,
        ("data={suite: custom, path: p, format: chat}", "data.columns={text: x}"),
        [
            "--set data.columns={text: x}: data.columns.text: format 'chat' has no such column; "
            "its columns are messages"
        ],
    ),
    (
        GOOD,
        ("data={suite: custom, path: p, format: text}", "data.labels=[a, a]"),
        [
            "--set data.labels=[a, a]: data.labels: labels are for format 'classification', "
            "data.format is 'text'",
            "--set data.labels=[a, a]: data.labels: label 'a' is listed twice",
        ],
    ),
    (
        GOOD,
        ("data.format=text", "data.columns.text=x", "data.labels=[a, b]"),
        [
            "--set data.format=text: data.format: only suite 'custom' reads this key, ",
            "--set data.columns.text=x: data.columns: only suite 'custom' reads this key, ",
            "--set data.labels=[a, b]: data.labels: only suite 'custom' reads this key, ",
        ],
    ),
    (
        GOOD,
        ("data={suite: glue}",),
        ["--set data={suite: glue}: data.tasks: missing, and it has no default (task names; "],
    ),
    # Settings per task
    (
        GOOD + "per_task:\n  wrld: {train: {max_steps: 3}}\n",
        (),
        ["r.yaml:18: per_task.wrld: unknown task; did you mean 'world'? allowed: world"],
    ),
    (
        GOOD + "per_task:\n  world: {model: {revision: a}}\n",
        (),
        ["r.yaml:18: per_task.world.model: unknown key; allowed: train, eval"],
    ),
    (
        GOOD + "per_task:\n  world:\n    train:\n      max_step: 3\n",
        (),
        ["r.yaml:20: per_task.world.train.max_step: unknown key; did you mean 'max_steps'?"],
    ),
    (
        change("suite: builtin\n  tasks: [world]", "suite: commonsense\n  tasks: [piqa, boolq]")
        + "per_task:\n  piqa: {train: {max_steps: 3}}\n",
        (),
        ["r.yaml:17: per_task: settings per task need exactly one task in data.tasks"],
    ),
    (
        GOOD + "per_task: [1]\n",
        (),
        ["r.yaml:17: per_task: found a list; allowed: a section with task names as keys"],
    ),
    # The text itself
    ("", (), ["r.yaml:1: the recipe is empty; moc recipes copy quickstart gives one to start "]),
    ("# nothing\n", (), ["r.yaml:1: the recipe is empty; "]),
    ("- seed: 1\n", (), ["r.yaml:1: found a list; a recipe is a set of sections: seed, model, "]),
    ("seed:1\n", (), ["r.yaml:1: found the text 'seed:1'; a recipe is a set of sections: "]),
    (
        "model:\n\tmodel_name_or_path: x\n",
        (),
        ["r.yaml:2: not valid YAML: a tab cannot start a token in YAML; indent with spaces"],
    ),
    (change("tasks: [world]", "tasks: [world"), (), ["r.yaml:9: not valid YAML: "]),
    (
        change("runs/x", "'runs/x"),
        (),
        ["r.yaml:14: not valid YAML: found unexpected end of stream (while scanning a quoted "],
    ),
    (change("  rank: 16", "   rank: 16"), (), ["r.yaml:5: not valid YAML: "]),
    (
        GOOD + "---\n" + GOOD,
        (),
        ["r.yaml:17: not valid YAML: a recipe is one document; remove the second '---'"],
    ),
    (
        change("rank: 16", "rank: &r 16\n  top_k: *r"),
        (),
        ["r.yaml:6: not valid YAML: aliases (*name) are not allowed in recipes; write the value"],
    ),
    (
        change("rank: 16", "rank: !!python/object/apply:os.system [true]"),
        (),
        [
            "r.yaml:5: not valid YAML: tags are not allowed in recipes; leave out "
            "!!python/object/apply:os.system"
        ],
    ),
    (change("runs/x", "runs/\x07x"), (), ["r.yaml:14: the character U+0007 is not allowed"]),
    ("seed: " + "[" * 500, (), ["r.yaml: nested too deeply"]),
    # Overrides
    (
        GOOD,
        ("trian.max_steps=3",),
        ["--set trian.max_steps=3: trian: unknown key; did you mean 'train'? allowed: "],
    ),
    (
        GOOD,
        ("method=cotrol",),
        ["--set method=cotrol: method: found 'cotrol'; did you mean 'control'? allowed: moc, "],
    ),
    (
        GOOD,
        ("seed", "=3", "train..lr=3", "data.tasks=[a"),
        [
            "--set seed: expected key=value, for example --set train.learning_rate=1.0e-4",
            "--set =3: expected key=value",
            "--set train..lr=3: expected key=value",
            "--set data.tasks=[a: not valid YAML: ",
        ],
    ),
    (
        GOOD,
        ("data.tasks.0=x", "model.revision.x=3", "method.rank.x=3"),
        [
            "--set data.tasks.0=x: data.tasks.0: 'data.tasks' is a list; set all of it",
            "--set model.revision.x=3: model.revision: found a section; allowed: a text",
            "--set method.rank.x=3: method.rank.x: 'method.rank' is a value, not a section",
        ],
    ),
    # Of every kind at once: the method is checked under the name that was meant
    (
        change("name: moc\n  rank: 16", "name: mocc\n  rnak: 16")
        .replace("max_steps: 20", "warmup_steps: 1\n  warmup_ratio: 0.5\n  bf16: 1\n  bf16: 0")
        .replace("  output_dir: runs/x\n", "  save_steps: 5\n"),
        ("seed=-1",),
        [
            "r.yaml:4: method.name: found 'mocc'",
            "r.yaml:5: method.rnak: unknown key",
            "r.yaml:11: train.warmup_ratio: warmup_steps (1) and",
            "r.yaml:13: train.bf16: given twice",
            "r.yaml:16: output.output_dir: missing",
            "--set seed=-1: seed: found -1",
        ],
    ),
    # A rule is silent about keys that are wrong themselves
    (
        change("before: true", "eval_strategy: steps\n  eval_stpes: 5"),
        (),
        ["r.yaml:13: eval.eval_stpes: unknown key; did you mean 'eval_steps'?"],
    ),
    (
        change("tasks: [world]", "tasks: [nowhere, 3]"),
        (),
        ["r.yaml:8: data.tasks.1: found 3; allowed: a text that is not empty"],
    ),
]


@pytest.mark.parametrize(("text", "overrides", "expected"), MISTAKES)
@pytest.mark.usefixtures("here")
def test_every_mistake_has_its_line_and_nothing_else_is_blamed(
    text: str, overrides: tuple[str, ...], expected: list[str]
) -> None:
    error = lines(text, *overrides)
    assert len(error) == len(expected), error
    for line, start in zip(error, expected, strict=True):
        assert line.startswith(start)


KEYS = [key for key in keys() if key.key != "method.name"]
IDS = [f"{key.key} {key.method}" for key in KEYS]


def with_method(key: Key) -> tuple[str, ...]:
    return (f"method={key.method}",) if key.method else ()


@pytest.mark.parametrize("key", KEYS, ids=IDS)
@pytest.mark.usefixtures("here")
def test_a_wrong_value_is_refused_with_what_is_allowed(key: Key) -> None:
    """Booleans and what is not finite are no numbers, for every key."""
    wrong = ["3" if key.allowed.startswith("a section") else "{a: 1}"]
    if key.type in ("integer", "number"):
        wrong += ["true", ".nan", ".inf", "word", "[1]", ""]
    for value in wrong:
        error = lines(GOOD, *with_method(key), f"{key.key}={value}")
        start = f"--set {key.key}={value}: {key.key}: found "
        (about,) = (line for line in error if line.startswith(start))
        assert about.endswith(f"; allowed: {key.allowed}")


@pytest.mark.parametrize("key", KEYS, ids=IDS)
@pytest.mark.usefixtures("here")
def test_a_misspelt_key_is_known_by_its_neighbour(key: Key) -> None:
    if key.key == "method.balance.f":
        return  # one letter has no neighbour
    wrong = f"{key.key}{key.key[-1]}"
    name = key.key.rpartition(".")[2]
    expected = f"--set {wrong}=3: {wrong}: unknown key; did you mean '{name}'? allowed: "
    assert any(line.startswith(expected) for line in lines(GOOD, *with_method(key), f"{wrong}=3"))


@pytest.mark.parametrize("key", KEYS, ids=IDS)
def test_every_key_is_described_in_plain_english(key: Key) -> None:
    words = key.description.split()
    assert 2 <= len(words) <= 40
    assert not key.description.endswith(".")
    assert not set(words) & {"one's", "oneself", "whole", "none", "told", "talk", "beside"}


def test_the_reference_shows_defaults_as_they_are_written() -> None:
    """Every default of the reference is a value that the recipe takes."""
    for key in KEYS:
        if key.default:
            value = read_yaml(key.default)
            assert not value.mistakes
            expected = METHODS[key.method]() if key.method else Recipe.model_validate(MINIMAL)
            for part in key.key.split(".")[1 if key.method else 0 :]:
                expected = getattr(expected, part, {})  # `per_task` is resolved
            assert value.value == expected, key


def test_numbers_have_bounds_in_the_schema_too() -> None:
    """An editor refuses what the recipe refuses."""
    rank = json_schema()["$defs"]["MocMethod"]["properties"]["rank"]
    assert (rank["type"], rank["minimum"], rank["default"]) == ("integer", 1, 64)


def test_mutated_recipes_never_give_a_traceback(here: Path) -> None:
    """540 files with lines lost, doubled, moved, indented or given other values."""
    random = Random(1)
    values = ("0", "-1", "true", "", "[]", "[a, b]", "{a: 1}", ".inf", "no", "custom", "!t y")
    files = sorted((ROOT / "recipes").rglob("*.yaml"))
    for _ in range(540):
        text = random.choice(files).read_text(encoding="utf-8").splitlines()
        for _ in range(random.randint(1, 3)):
            here_, there = random.randrange(len(text)), random.randrange(len(text))
            line = text[here_]
            change_line = random.randrange(6)
            if change_line == 0:
                text[here_] = line[: len(line) // 2] + line[len(line) // 2 + 1 :]
            elif change_line == 1:
                text.insert(there, line)
            elif change_line == 2:
                text[here_] = f"{line.partition(':')[0]}: {random.choice(values)}"
            elif change_line == 3:
                text[here_] = f"  {line}"
            elif change_line == 4:
                text[here_], text[there] = text[there], line
            else:
                text[here_] = ""
        overrides = random.choice([(), ("method=lora",), ("data.suite=custom",), ("data.x.y=1",)])
        with suppress(RecipeError):
            read("\n".join(text), *overrides)


def test_the_good_recipe_is_good(here: Path) -> None:
    recipe = read(GOOD)
    assert recipe.method.rank == 16
    assert recipe.train.max_steps == 20


def test_files_that_cannot_be_read(here: Path) -> None:
    Path("good.yaml").write_text(GOOD)
    Path("folder").mkdir()
    Path("latin.yaml").write_bytes(b"seed: 1\nmodel:\n  model_name_or_path: caf\xe9\n")
    for name, expected in {
        "goood.yaml": "goood.yaml: no such file, and no shipped recipe of that name; "
        "did you mean 'good.yaml'?",
        "quikstart": "quikstart: no such file, and no shipped recipe of that name; "
        "did you mean 'quickstart'?",
        "folder": "folder: a folder, not a recipe",
        "latin.yaml": "latin.yaml:3: not UTF-8 text; save the recipe as UTF-8",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert caught.value.message == expected


def test_overrides_edit_and_replace(here: Path) -> None:
    assert read(GOOD, "train.learning_rate=1e-4").train.learning_rate == 1e-4
    assert read(GOOD, "method.rank=8").method.rank == 8
    assert read(GOOD, "data.tasks=world").data.tasks == ["world"]
    assert read(GOOD, "eval.eval_strategy=no").eval.eval_strategy == "no"
    assert read(GOOD, "seed=1", "seed=2").seed == 2
    assert read(GOOD, "train={max_steps: 7}").train.max_steps == 7
    assert read(GOOD, "method.gate.kind=linear").method.gate.kind == "linear"


def test_method_override_takes_that_methods_defaults(here: Path) -> None:
    """The file's rank 16 belongs to its own method; keys of the new one may be set in any order."""
    replaced = read(GOOD, "method=control").method
    assert replaced == METHODS["control"]()
    for order in (("method=control", "method.rank=8"), ("method.rank=8", "method=control")):
        assert read(GOOD, *order).method == METHODS["control"](rank=8)


def test_renaming_the_method_in_place_says_what_to_do(here: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        read(change("rank: 16", "alpha: 0.9"), "method.name=control")
    assert "r.yaml:5: method.alpha: method 'control' has no such key" in caught.value.message
    assert caught.value.hint == "--set method=<name> takes a method with its own defaults."


PER_TASK = """\
model: {model_name_or_path: m}
data: {suite: glue, tasks: [mrpc]}
train: {learning_rate: 1.0e-3, num_train_epochs: 1}
output: {output_dir: o}
per_task:
  mrpc: {train: {num_train_epochs: 30}, eval: {eval_strategy: epoch}}
  rte: {train: {num_train_epochs: 80, learning_rate: 4.0e-4}}
"""


def test_per_task_lies_between_the_file_and_the_overrides(here: Path) -> None:
    def numbers(*overrides: str) -> tuple[float, float, str]:
        recipe = read(PER_TASK, *overrides)
        train = recipe.train
        return train.num_train_epochs, train.learning_rate, recipe.eval.eval_strategy

    assert numbers() == (30, 1e-3, "epoch")
    assert numbers("data.tasks=rte") == (80, 4e-4, "no")
    assert numbers("data.tasks=sst2") == (1, 1e-3, "no")
    assert numbers("data.tasks=rte", "train.num_train_epochs=2") == (2, 4e-4, "no")
    assert numbers("per_task.mrpc.train.num_train_epochs=5") == (5, 1e-3, "epoch")
    assert "per_task" not in dump(read(PER_TASK))


def test_entries_of_other_tasks_are_checked_too(here: Path) -> None:
    broken = PER_TASK.replace("learning_rate: 4.0e-4}}", "warmup_steps: 1, warmup_ratio: 0.1}}")
    assert lines(broken)[0].startswith("r.yaml:7: per_task.rte.train.warmup_ratio: warmup_steps")
    assert len(lines(broken)) == 1


def test_former_keys_are_read_with_the_one_value_they_could_have(here: Path) -> None:
    """Older versions wrote them into every run folder; nothing has ever read them."""
    text = change("max_steps: 20", "max_steps: 20\n  optim: adamw") + "  num_processes: 1\n"
    assert read(text) == read(GOOD)
    expected = [
        "--set train.optim=sgd: train.optim: unknown key",
        "--set launch.num_processes=2: launch.num_processes: unknown key",
    ]
    error = lines(text, "train.optim=sgd", "launch.num_processes=2")
    assert [": ".join(line.split(": ")[:2]) for line in error] == [
        ": ".join(line.split(": ")[:2]) for line in expected
    ]


def test_former_keys_in_a_checkpoint_are_no_change_of_the_recipe(here: Path) -> None:
    now = read(GOOD).model_dump(mode="json")
    saved = now | {"train": now["train"] | {"optim": "adamw"}}
    saved["launch"] = now["launch"] | {"num_processes": 1}
    assert check_recipe(saved, now) == []


def test_an_entry_may_be_right_for_its_own_task_alone(here: Path) -> None:
    """The metric of a regression, in the entry of the regression."""
    text = PER_TASK.replace("rte: {", "stsb: {eval: {metric_for_best_model: pearson}, ")
    assert read(text).eval.metric_for_best_model is None
    assert read(text, "data.tasks=stsb").eval.metric_for_best_model == "pearson"
    assert lines(text.replace("stsb:", "rte:"))[0].startswith(
        "r.yaml:7: per_task.rte.eval.metric_for_best_model: task 'rte' has no pearson"
    )


def test_an_override_of_one_key_leaves_the_entrys_others(here: Path) -> None:
    """Also where the file has no such section."""
    text = PER_TASK.replace("train: {learning_rate: 1.0e-3, num_train_epochs: 1}\n", "")
    train = read(text, "train.max_steps=3").train
    assert (train.max_steps, train.num_train_epochs) == (3, 30)


def test_numbers_as_people_write_them(here: Path) -> None:
    """PyYAML takes 1e-4 for a text; a whole float is a whole number; quoted numbers are numbers."""
    assert read(change("max_steps: 20", "learning_rate: 1e-4")).train.learning_rate == 1e-4
    assert read(change("max_steps: 20", "learning_rate: '1e-4'")).train.learning_rate == 1e-4
    assert read(change("max_steps: 20", "max_steps: 1e3")).train.max_steps == 1000
    assert read(change("rank: 16", "rank: 16.0")).method.rank == 16
    assert read(change("max_steps: 20", "num_train_epochs: 2")).train.num_train_epochs == 2.0


def test_words_that_yaml_1_1_takes_for_booleans(here: Path) -> None:
    assert read(change("before: true", "eval_strategy: no")).eval.eval_strategy == "no"
    assert read(change("before: true", "eval_strategy: false")).eval.eval_strategy == "no"
    assert read(change("before: true", "before: yes")).eval.before is True
    assert read(change("before: true", "before: off")).eval.before is False


def test_short_forms(here: Path) -> None:
    text = change("method:\n  name: moc\n  rank: 16\n", "method: control\n")
    text = text.replace("tasks: [world]", "tasks: world").replace("device: cpu", "")
    recipe = read(text)
    assert recipe.method == METHODS["control"]()
    assert recipe.data.tasks == ["world"]
    assert recipe.launch.device == "auto"  # a section with nothing under its name is all defaults


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.usefixtures("here")
def test_dump_round_trips_through_any_reader(name: str) -> None:
    recipe = read(GOOD, f"method={name}", "train.learning_rate=1e-5", "eval.eval_strategy=no")
    text = dump(recipe)
    assert read(text) == recipe
    assert Recipe.model_validate(yaml.safe_load(text)) == recipe
    assert isinstance(yaml.safe_load(text)["train"]["learning_rate"], float)
    assert dump(read(text)) == text


def test_a_recipe_is_frozen_and_refuses_bad_combinations_without_a_file() -> None:
    values = yaml.safe_load(GOOD)
    recipe = Recipe.model_validate(values)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 3
    values["train"] = {"warmup_steps": 3, "warmup_ratio": 0.1}
    with pytest.raises(ValueError, match="both set the warm-up"):
        Recipe.model_validate(values)


def test_schema_describes_every_key_and_accepts_the_short_forms() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for key, field in section["properties"].items():
            assert field.get("description"), key
    forms = schema["properties"]["method"]["anyOf"]
    assert {"enum": list(METHODS), "type": "string"} in forms
    tasks = schema["$defs"]["DataSection"]["properties"]["tasks"]["anyOf"]
    assert [form["type"] for form in tasks] == ["string", "array"]


def test_scalars_are_those_of_yaml_1_2() -> None:
    for text, value in {
        "1e-4": 1e-4,
        "1.5E+3": 1500.0,
        "-.5": -0.5,
        "1_000": 1000,
        "010": 10,
        "0x10": "0x10",
        "1:30": "1:30",
        "no": "no",
        "on": "on",
        "True": True,
        "~": None,
        "": None,
        ".": ".",
        "-": "-",
        "1.2.3": "1.2.3",
        "2024-01-01": "2024-01-01",
    }.items():
        found = parse_scalar(text)
        assert found == value, text
        assert type(found) is type(value), text
    assert math.isnan(parse_scalar(".nan"))
    assert parse_scalar("-.INF") == -math.inf
    assert read_yaml("a: '1e-4'").value == {"a": "1e-4"}


def test_nearest_word() -> None:
    keys = ["rank", "learning_rate", "per_device_train_batch_size", "ARC-Easy"]
    assert nearest("Rank", keys) == "rank"
    assert nearest("learning-rate", keys) == "learning_rate"
    assert nearest("batch_size", keys) == "per_device_train_batch_size"
    assert nearest("arc-easy", keys) == "ARC-Easy"
    assert nearest("qqqq", keys) is None
