"""Recipes: what is read, what is refused and in which words, overrides, the round trip."""

import math
from pathlib import Path

import pytest
import yaml

from moc_cli.errors import RecipeError
from moc_cli.recipe.load import dump, json_schema, load_recipe
from moc_cli.recipe.methods import METHODS
from moc_cli.recipe.reader import parse_scalar, read_yaml
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import nearest

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


# (name, text, the one line that is expected, from its start; further pieces of that line)
BROKEN = [
    # Keys
    (
        "misspelt section",
        change("train:", "trian:"),
        "r.yaml:9: trian: unknown key; did you mean 'train'? allowed: " + SECTIONS,
    ),
    (
        "misspelt key",
        change("rank: 16", "rnak: 16"),
        "r.yaml:5: method.rnak: unknown key; did you mean 'rank'? allowed: name, rank, scale, ",
    ),
    (
        "key by its name elsewhere",
        change("max_steps: 20", "lr: 1.0e-3"),
        "r.yaml:10: train.lr: unknown key; did you mean 'learning_rate'? allowed: num_train_epochs",
    ),
    (
        "key in the wrong section",
        change("device: cpu", "learning_rate: 1.0e-3"),
        "r.yaml:16: launch.learning_rate: unknown key; it belongs under 'train'; allowed here: ",
    ),
    (
        "key far from any",
        change("before: true", "zzz: true"),
        "r.yaml:12: eval.zzz: unknown key; allowed: per_device_eval_batch_size, ",
    ),
    (
        "key of another method",
        change("name: moc", "name: control\n  top_k: 2"),
        "r.yaml:5: method.top_k: method 'control' has no such key (it belongs to moc); allowed: ",
    ),
    (
        "misspelt key two levels down",
        change("rank: 16", "gate:\n    knd: linear"),
        "r.yaml:6: method.gate.knd: unknown key; did you mean 'kind'? allowed: kind, ",
    ),
    (
        "key given twice",
        change("rank: 16", "rank: 16\n  rank: 8"),
        "r.yaml:6: method.rank: given twice, in lines 5 and 6; keep one",
    ),
    (
        "section given twice",
        GOOD + "data:\n  suite: glue\n",
        "r.yaml:17: data: given twice, in lines 6 and 17; keep one",
    ),
    (
        "key that is no word",
        GOOD + "? [a, b]\n: 1\n",
        "r.yaml:17: a key must be a word",
    ),
    # Missing
    (
        "missing key",
        change("  model_name_or_path: builtin:world-llama\n", "  revision: main\n"),
        "r.yaml:1: model.model_name_or_path: missing, and it has no default (hub id, ",
    ),
    (
        "missing section",
        change("output:\n  output_dir: runs/x\n", ""),
        "r.yaml: output: missing section; it needs output_dir",
    ),
    (
        "empty section that needs a key",
        change("output:\n  output_dir: runs/x\n", "output:\n"),
        "r.yaml:13: output.output_dir: missing, and it has no default (the run folder)",
    ),
    (
        "method without a name",
        change("  name: moc\n", ""),
        "r.yaml:3: method.name: missing; allowed: moc, control",
    ),
    # Values
    (
        "unknown method",
        change("name: moc", "name: mocc"),
        "r.yaml:4: method.name: found 'mocc'; did you mean 'moc'? allowed: moc, control",
    ),
    (
        "unknown method in the short form",
        change("method:\n  name: moc\n  rank: 16\n", "method: contorl\n"),
        "r.yaml:3: method: found 'contorl'; did you mean 'control'? allowed: moc, control",
    ),
    (
        "method that is a number",
        change("name: moc", "name: 3"),
        "r.yaml:4: method.name: found 3; allowed: moc, control",
    ),
    (
        "misspelt choice",
        change("device: cpu", "device: cuad"),
        "r.yaml:16: launch.device: found 'cuad'; did you mean 'cuda'? allowed: auto, cpu, cuda",
    ),
    (
        "misspelt choice that may be null",
        change("before: true", "metric_for_best_model: acuracy"),
        "r.yaml:12: eval.metric_for_best_model: found 'acuracy'; did you mean 'accuracy'? "
        "allowed: loss, accuracy, f1, matthews, pearson, spearman, perplexity, null",
    ),
    (
        "word for a whole number",
        change("rank: 16", "rank: sixteen"),
        "r.yaml:5: method.rank: found 'sixteen'; allowed: a whole number of at least 1",
    ),
    (
        "word for a number",
        change("max_steps: 20", "learning_rate: fast"),
        "r.yaml:10: train.learning_rate: found 'fast'; allowed: a number above 0",
    ),
    (
        "fraction for a whole number",
        change("rank: 16", "rank: 16.5"),
        "r.yaml:5: method.rank: found 16.5; allowed: a whole number of at least 1",
    ),
    (
        "boolean for a whole number",
        change("rank: 16", "rank: true"),
        "r.yaml:5: method.rank: found true; allowed: a whole number of at least 1",
    ),
    (
        "boolean for a number",
        change("max_steps: 20", "weight_decay: false"),
        "r.yaml:10: train.weight_decay: found false; allowed: a number of at least 0",
    ),
    (
        "too small",
        change("rank: 16", "rank: 0"),
        "r.yaml:5: method.rank: found 0; allowed: a whole number of at least 1",
    ),
    (
        "too large",
        change("rank: 16", "alpha: 1.5"),
        "r.yaml:5: method.alpha: found 1.5; allowed: a number from 0 to 1",
    ),
    (
        "at an open bound",
        change("max_steps: 20", "adam_beta2: 1.0"),
        "r.yaml:10: train.adam_beta2: found 1.0; allowed: a number of at least 0 and below 1",
    ),
    (
        "not a number",
        change("max_steps: 20", "learning_rate: .nan"),
        "r.yaml:10: train.learning_rate: found nan; allowed: a number above 0",
    ),
    (
        "infinite",
        change("max_steps: 20", "max_grad_norm: .inf"),
        "r.yaml:10: train.max_grad_norm: found inf; allowed: a number of at least 0",
    ),
    (
        "word nan",
        change("max_steps: 20", "learning_rate: nan"),
        "r.yaml:10: train.learning_rate: found 'nan'; allowed: a number above 0",
    ),
    (
        "number too large to hold",
        change("max_steps: 20", "learning_rate: 1e999"),
        "r.yaml:10: train.learning_rate: found inf; allowed: a number above 0",
    ),
    (
        "null where a value is needed",
        change("rank: 16", "rank:"),
        "r.yaml:5: method.rank: found nothing; allowed: a whole number of at least 1",
    ),
    (
        "number for a text",
        change("output_dir: runs/x", "output_dir: 7"),
        "r.yaml:14: output.output_dir: found 7; allowed: a text that is not empty",
    ),
    (
        "empty text",
        change("output_dir: runs/x", "output_dir: ''"),
        "r.yaml:14: output.output_dir: found ''; allowed: a text that is not empty",
    ),
    (
        "word for a boolean",
        change("before: true", "before: maybe"),
        "r.yaml:12: eval.before: found 'maybe'; allowed: true or false",
    ),
    (
        "list for a number",
        change("rank: 16", "rank: [16]"),
        "r.yaml:5: method.rank: found a list; allowed: a whole number of at least 1",
    ),
    (
        "section for a number",
        change("rank: 16", "rank: {a: 1}"),
        "r.yaml:5: method.rank: found a section; allowed: a whole number of at least 1",
    ),
    (
        "text for a section",
        change("data:\n  suite: builtin\n  tasks: [world]\n", "data: glue\n"),
        "r.yaml:6: data: found 'glue'; allowed: a section with the keys suite, tasks, path, ",
    ),
    (
        "list for a section",
        change("train:\n  max_steps: 20\n", "train: [1]\n"),
        "r.yaml:9: train: found a list; allowed: a section with the keys num_train_epochs, ",
    ),
    (
        "empty list",
        change("tasks: [world]", "tasks: []"),
        "r.yaml:8: data.tasks: found an empty list; allowed: a list of texts",
    ),
    (
        "wrong item of a list",
        change("tasks: [world]", "tasks:\n    - 3"),
        "r.yaml:9: data.tasks.0: found 3; allowed: a text that is not empty",
    ),
    (
        "misspelt item of a list",
        change("output_dir: runs/x", "output_dir: runs/x\n  report_to: [tensorbord]"),
        "r.yaml:15: output.report_to.0: found 'tensorbord'; did you mean 'tensorboard'? "
        "allowed: tensorboard, wandb, trackio",
    ),
    (
        "several processes",
        change("device: cpu", "num_processes: 4"),
        "r.yaml:16: launch.num_processes: found 4; only 1 process is supported for now",
    ),
    (
        "no steps",
        change("max_steps: 20", "max_steps: 0"),
        "r.yaml:10: train.max_steps: found 0; allowed: -1 (as many as num_train_epochs gives) or",
    ),
    (
        "unknown builtin model",
        change("builtin:world-llama", "builtin:world-lama"),
        "r.yaml:2: model.model_name_or_path: found 'builtin:world-lama'; did you mean "
        "'builtin:world-llama'? allowed: builtin:world-llama",
    ),
    (
        "placement without a part",
        change("rank: 16", "placement: {layers: h, attn: {read: a, write: b}, causal: true}"),
        "r.yaml:5: method.placement.ffn: missing section; it needs read, write",
    ),
    # Combinations
    (
        "unknown task",
        change("suite: builtin\n  tasks: [world]", "suite: commonsense\n  tasks: [ARC_Easy]"),
        "r.yaml:8: data.tasks.0: suite 'commonsense' has no task 'ARC_Easy'; did you mean "
        "'ARC-Easy'? allowed: boolq, piqa, social_i_qa, ",
    ),
    (
        "task of another suite",
        change("tasks: [world]", "tasks: [mrpc]"),
        "r.yaml:8: data.tasks.0: suite 'builtin' has no task 'mrpc'; allowed: world",
    ),
    (
        "two tasks of glue",
        change("suite: builtin\n  tasks: [world]", "suite: glue\n  tasks: [mrpc, rte]"),
        "r.yaml:8: data.tasks: glue trains one task a run, found 2",
    ),
    (
        "task twice",
        change("suite: builtin\n  tasks: [world]", "suite: commonsense\n  tasks: [piqa, piqa]"),
        "r.yaml:8: data.tasks.1: task 'piqa' is listed twice",
    ),
    (
        "folder for the builtin suite",
        change("tasks: [world]", "tasks: [world]\n  path: data"),
        "r.yaml:9: data.path: the builtin suite is inside this package; leave data.path out",
    ),
    (
        "two warm-ups",
        change("max_steps: 20", "warmup_steps: 5\n  warmup_ratio: 0.1"),
        "r.yaml:11: train.warmup_ratio: warmup_steps (5) and warmup_ratio (0.1) are two ways to ",
    ),
    (
        "steps without a number",
        change("before: true", "eval_strategy: steps"),
        "r.yaml:12: eval.eval_strategy: eval_strategy 'steps' needs eval.eval_steps",
    ),
    (
        "early stopping without evaluation",
        change("before: true", "early_stopping_patience: 3"),
        "r.yaml:12: eval.early_stopping_patience: early stopping needs evaluation during training",
    ),
    (
        "evaluation without rows",
        change(
            "suite: builtin\n  tasks: [world]",
            "suite: commonsense\n  tasks: [piqa]\n  held_out: 0",
        ).replace("before: true", "eval_strategy: epoch"),
        "r.yaml:9: data.held_out: evaluation during training needs held-out rows, found 0",
    ),
    (
        "metric of another task",
        change("suite: builtin\n  tasks: [world]", "suite: glue\n  tasks: [cola]").replace(
            "before: true", "metric_for_best_model: pearson"
        ),
        "r.yaml:12: eval.metric_for_best_model: task 'cola' has no pearson; allowed: matthews,",
    ),
    (
        "flash attention on a CPU",
        change("world-llama", "world-llama\n  attn_implementation: flash_attention_2"),
        "r.yaml:3: model.attn_implementation: flash_attention_2 needs a GPU, launch.device is cpu",
    ),
    (
        "flash attention in float32",
        change("world-llama", "world-llama\n  attn_implementation: flash_attention_2").replace(
            "device: cpu", "device: cuda"
        ),
        "r.yaml:3: model.attn_implementation: flash_attention_2 needs train.bf16: true",
    ),
    # Settings per task
    (
        "per_task of an unknown task",
        GOOD + "per_task:\n  wrld: {train: {max_steps: 3}}\n",
        "r.yaml:18: per_task.wrld: unknown task; did you mean 'world'? allowed: world",
    ),
    (
        "per_task with a wrong section",
        GOOD + "per_task:\n  world: {model: {revision: a}}\n",
        "r.yaml:18: per_task.world.model: unknown key; allowed: train, eval",
    ),
    (
        "per_task with a misspelt key",
        GOOD + "per_task:\n  world:\n    train:\n      max_step: 3\n",
        "r.yaml:20: per_task.world.train.max_step: unknown key; did you mean 'max_steps'?",
    ),
    (
        "per_task for several tasks",
        change("suite: builtin\n  tasks: [world]", "suite: commonsense\n  tasks: [piqa, boolq]")
        + "per_task:\n  piqa: {train: {max_steps: 3}}\n",
        "r.yaml:17: per_task: settings per task need exactly one task in data.tasks",
    ),
    (
        "per_task that is a list",
        GOOD + "per_task: [1]\n",
        "r.yaml:17: per_task: found a list; allowed: a section with task names as keys",
    ),
    # The file itself
    (
        "empty file",
        "",
        "r.yaml:1: the recipe is empty; moc recipes copy quickstart gives one to start from",
    ),
    ("only a comment", "# nothing\n", "r.yaml:1: the recipe is empty; "),
    (
        "a list",
        "- seed: 1\n",
        "r.yaml:1: found a list; a recipe is a set of sections: seed, model, method, ",
    ),
    ("a text", "seed:1\n", "r.yaml:1: found the text 'seed:1'; a recipe is a set of sections: "),
    (
        "a tab",
        "model:\n\tmodel_name_or_path: x\n",
        "r.yaml:2: not valid YAML: a tab cannot start a token in YAML; indent with spaces",
    ),
    (
        "a bracket left open",
        change("tasks: [world]", "tasks: [world"),
        "r.yaml:9: not valid YAML: ",
    ),
    (
        "a quote left open",
        change("runs/x", "'runs/x"),
        "r.yaml:14: not valid YAML: found unexpected end of stream (while scanning a quoted scalar",
    ),
    (
        "indentation that does not match",
        change("  rank: 16", "   rank: 16"),
        "r.yaml:5: not valid YAML: ",
    ),
    (
        "two documents",
        GOOD + "---\n" + GOOD,
        "r.yaml:17: not valid YAML: a recipe is one document; take out the second '---'",
    ),
    (
        "an alias",
        change("rank: 16", "rank: &r 16\n  top_k: *r"),
        "r.yaml:6: not valid YAML: aliases (*name) are not read in recipes; write the value out",
    ),
    (
        "a tag that would run code",
        change("rank: 16", "rank: !!python/object/apply:os.system [true]"),
        "r.yaml:5: method.rank: the tag !!python/object/apply:os.system is not read in recipes",
    ),
    (
        "a control character",
        change("runs/x", "runs/\x07x"),
        "r.yaml:14: the character U+0007 is not allowed",
    ),
    ("nesting without end", "seed: " + "[" * 500, "r.yaml: nested too deeply"),
]


@pytest.mark.parametrize(
    ("text", "expected"), [case[1:] for case in BROKEN], ids=[c[0] for c in BROKEN]
)
@pytest.mark.usefixtures("here")
def test_broken_recipe_gives_its_one_sentence(text: str, expected: str) -> None:
    """Every mistake is named in its own line, with its place, and nothing else is blamed."""
    found = lines(text)
    assert [line for line in found if line.startswith(expected)], found
    assert len(found) == 1, found


def test_the_table_is_large() -> None:
    assert len(BROKEN) >= 40


def test_the_good_recipe_is_good(here: Path) -> None:
    recipe = read(GOOD)
    assert recipe.method.rank == 16
    assert recipe.train.max_steps == 20


def test_three_mistakes_are_all_named_in_order(here: Path) -> None:
    text = change("rank: 16", "rnak: 16").replace("max_steps: 20", "learning_rate: fast")
    text = text.replace("before: true", "eval_strategy: steps")
    found = lines(text)
    assert [line.split(": ")[:2] for line in found] == [
        ["r.yaml:5", "method.rnak"],
        ["r.yaml:10", "train.learning_rate"],
        ["r.yaml:12", "eval.eval_strategy"],
    ]


def test_mistakes_of_every_kind_come_together(here: Path) -> None:
    """Duplicate key, unknown method with a wrong key in it, combination, missing key, override."""
    text = change("name: moc", "name: mocc").replace("rank: 16", "rnak: 16")
    text = text.replace(
        "max_steps: 20", "warmup_steps: 1\n  warmup_ratio: 0.5\n  bf16: 1\n  bf16: 0"
    )
    text = text.replace("  output_dir: runs/x\n", "  save_steps: 5\n")
    assert [line.split(": ")[:2] for line in lines(text, "seed=-1")] == [
        ["r.yaml:4", "method.name"],
        ["r.yaml:5", "method.rnak"],
        ["r.yaml:11", "train.warmup_ratio"],
        ["r.yaml:13", "train.bf16"],
        ["r.yaml:16", "output.output_dir"],
        ["--set seed=-1", "seed"],
    ]


def test_a_key_given_twice_is_still_checked(here: Path) -> None:
    assert len(lines(change("rank: 16", "rank: x\n  rank: 8"))) == 2


def test_a_rule_is_silent_about_keys_that_are_wrong_themselves(here: Path) -> None:
    text = change("before: true", "eval_strategy: steps\n  eval_stpes: 5")
    assert len(lines(text)) == 1
    text = change("tasks: [world]", "tasks: [world, 3]")
    assert len(lines(text)) == 1


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


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.max_step=3", "train.max_step: unknown key; did you mean 'max_steps'? allowed: "),
        ("trian.max_steps=3", "trian: unknown key; did you mean 'train'? allowed: "),
        ("method=cotrol", "method: found 'cotrol'; did you mean 'control'? allowed: moc, "),
        ("method.rank=x", "method.rank: found 'x'; allowed: a whole number of at least 1"),
        ("train.learning_rate=", "train.learning_rate: found nothing; allowed: a number above 0"),
        ("seed", "expected key=value, for example --set train.learning_rate=1.0e-4"),
        ("=3", "expected key=value"),
        ("train..lr=3", "expected key=value"),
        ("data.tasks=[a", "not valid YAML: "),
        ("data.tasks.0=x", "data.tasks.0: 'data.tasks' is a list; set all of it"),
        ("model.revision.x=3", "model.revision: found a section; allowed: a text"),
        ("method.rank.x=3", "method.rank.x: 'method.rank' is a value, not a section"),
    ],
)
@pytest.mark.usefixtures("here")
def test_broken_override_is_its_own_place(override: str, expected: str) -> None:
    found = lines(GOOD, override)
    assert len(found) == 1
    assert found[0].startswith(f"--set {override}: {expected}"), found


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
    with pytest.raises(ValueError, match="two ways to say one thing"):
        Recipe.model_validate(values)


def test_schema_describes_every_key_and_accepts_the_short_forms() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    for section in sections:
        assert section["additionalProperties"] is False
        for key, field in section["properties"].items():
            assert field.get("description"), key
    forms = schema["properties"]["method"]["anyOf"]
    assert {"enum": list(METHODS)} in forms
    assert {"type": "string"} in schema["$defs"]["DataSection"]["properties"]["tasks"]["anyOf"]


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
