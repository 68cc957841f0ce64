"""Recipes: what is read, what is refused and in which words, overrides, the round trip."""

import math
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import yaml
from support.messages import refused

from moc_cli.errors import RecipeError
from moc_cli.recipe.catalog import entries
from moc_cli.recipe.load import dump, load_recipe
from moc_cli.recipe.methods import METHODS, PlacementSection
from moc_cli.recipe.reader import as_text, parse_scalar, read_yaml
from moc_cli.recipe.reference import Key, json_schema, keys
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import nearest
from moc_cli.training.changes import check_recipe

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
    """Load a broken recipe and return the lines of the error."""
    with pytest.raises(RecipeError) as caught:
        read(text, *overrides)
    return caught.value.message.split("\n")


def change(old: str, new: str) -> str:
    """Return the good recipe with one piece of text exchanged."""
    assert old in GOOD
    return GOOD.replace(old, new)


def mistakes() -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield text, overrides and the beginnings of the error's lines, from mistakes.txt."""
    table = Path(__file__).with_name("mistakes.txt").read_text(encoding="utf-8")
    for block in table.split("\n\n")[1:]:
        text, overrides, expected = GOOD, [], []
        for line in block.strip("\n").split("\n"):
            if line.startswith("! "):
                expected.append(line.removeprefix("! "))
            elif line.startswith("--set "):
                overrides.append(line.removeprefix("--set "))
            elif not line.startswith("# "):
                edit = re.sub(r"\\(n|t|x07)", lambda escape: ESCAPES[escape[1]], line)
                old, arrow, new = edit.partition(" ->")
                if arrow:
                    assert old in text, line
                    text = text.replace(old, new.removeprefix(" "), 1)
                else:
                    kind, _, piece = edit.partition(" ")
                    text = {"add": text, "text": ""}[kind] + piece
        yield text, overrides, expected


ESCAPES = {"n": "\n", "t": "\t", "x07": "\x07"}


@pytest.mark.parametrize(("text", "overrides", "expected"), list(mistakes()))
@pytest.mark.usefixtures("here")
def test_every_mistake_has_its_line_and_nothing_else_is_blamed(
    text: str, overrides: list[str], expected: list[str]
) -> None:
    error = lines(text, *overrides)
    assert len(error) == len(expected), error
    for line, start in zip(error, expected, strict=True):
        assert line.startswith(start)


def test_nesting_without_end_is_one_mistake(here: Path) -> None:
    assert lines("seed: " + "[" * 500) == ["r.yaml: nested too deeply"]


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
    places = {"layers": "x", "attn": {"read": "x", "write": "x"}, "causal": True}
    placement = PlacementSection.model_validate(places | {"ffn": places["attn"]})
    for key in KEYS:
        if key.default:
            value = read_yaml(key.default)
            assert not value.mistakes
            expected = METHODS[key.method]() if key.method else Recipe.model_validate(MINIMAL)
            for part in key.key.split(".")[1 if key.method else 0 :]:
                # `per_task` is resolved; a method has no placement unless it is given one.
                expected = getattr(placement if expected is None else expected, part, {})
            assert value.value == expected, key


def test_numbers_have_bounds_in_the_schema_too() -> None:
    """An editor refuses what the recipe refuses."""
    rank = json_schema()["$defs"]["MocMethod"]["properties"]["rank"]
    assert (rank["type"], rank["minimum"], rank["default"]) == ("integer", 1, 64)


def test_mutated_recipes_never_give_a_traceback(here: Path) -> None:
    """540 files with lines lost, doubled, moved, indented or given other values."""
    random = Random(1)
    values = ("0", "-1", "true", "", "[]", "[a, b]", "{a: 1}", ".inf", "no", "custom", "!t y")
    files = [entry.path for entry in entries()]
    texts = [GOOD, GOOD, PER_TASK, PER_TASK, *(path.read_text("utf-8") for path in files)]
    for _ in range(540):
        text = random.choice(texts).splitlines()
        for _ in range(random.randint(1, 3)):
            this, there = random.randrange(len(text)), random.randrange(len(text))
            line = text[this]
            edit = random.randrange(6)
            if edit == 0:
                text[this] = line[: len(line) // 2] + line[len(line) // 2 + 1 :]
            elif edit == 1:
                text.insert(there, line)
            elif edit == 2:
                text[this] = f"{line.partition(':')[0]}: {random.choice(values)}"
            elif edit == 3:
                text[this] = f"  {line}"
            elif edit == 4:
                text[this], text[there] = text[there], line
            else:
                text[this] = ""
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
    for name in ("goood.yaml", "quikstart", "folder", "latin.yaml"):
        with refused(RecipeError):
            load_recipe(name)


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
    with refused(RecipeError):
        read(change("rank: 16", "alpha: 0.9"), "method.name=control")


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


def test_a_key_of_older_versions_in_a_checkpoint_is_no_change_of_the_recipe(here: Path) -> None:
    """They wrote num_processes: 1 into every run folder."""
    now = read(GOOD).model_dump(mode="json")
    old = {key: now["launch"][key] for key in ("device", "num_threads")}
    saved = now | {"launch": old | {"num_processes": 1}}
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


@pytest.mark.parametrize("text", ["08", "1e5", "0x1F", "~", "no", "null", "1_0", "12:30", "🦜"])
@pytest.mark.usefixtures("here")
def test_texts_that_look_like_something_else_stay_texts(text: str) -> None:
    """Readers of YAML 1.1 and 1.2 take other words for numbers."""
    recipe = read(GOOD).changed(data={"labels": [text, "b"]}, output={"output_dir": text})
    dumped = dump(recipe)
    for values in (yaml.safe_load(dumped), read_yaml(dumped).value):
        assert values["data"]["labels"] == [text, "b"]
        assert values["output"]["output_dir"] == text
    assert read_yaml(as_text(text)).value == text


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["strategy=deepspeed"], "launch.strategy: deepspeed is not supported"),
        (["machine_rank=1"], "launch.machine_rank: found 1; allowed: 0 to 0"),
        (["num_machines=2"], "launch.main_process_ip: several machines need the address"),
        (
            ["num_machines=2", "main_process_ip=a", "num_processes=3"],
            "launch.num_processes: 3 processes cannot be shared equally by 2 machines",
        ),
        (
            ["num_machines=2", "main_process_ip=a", "main_process_port=0"],
            "launch.main_process_port: several machines need a port",
        ),
    ],
)
def test_keys_of_launch_that_cannot_work_together(
    here: Path, changes: list[str], message: str
) -> None:
    (line,) = lines(GOOD, *(f"launch.{change}" for change in changes))
    assert message in line
