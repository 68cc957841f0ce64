"""Every shipped recipe is valid, complete and found by its name."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.machine import ROOT
from support.messages import refused

from moc_cli.errors import RecipeError
from moc_cli.recipe import catalog
from moc_cli.recipe.load import dump, load_recipe
from moc_cli.recipe.methods import METHODS
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.sweep import read_sweep
from moc_cli.sweep.plan import make_plan

SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))
RESULTS = sorted((ROOT / "recipes" / "results").rglob("*.yaml"))
FILES = sorted({*(ROOT / "recipes").rglob("*.yaml")} - {*SWEEPS} - {*RESULTS})
ORDER = ["seed", "model", "method", "data", "train", "per_task", "eval", "output", "launch"]
NAMES = [path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in FILES]


def test_the_catalogue_holds_every_file() -> None:
    assert [entry.name for entry in catalog.entries()] == sorted(NAMES)
    assert "quickstart" in NAMES
    assert all(entry.summary for entry in catalog.entries())


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_shipped_recipe_is_valid_and_explained(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
    recipe = load_recipe(path)
    keys = list(yaml.safe_load(text))
    assert keys == [key for key in ORDER if key in keys]
    assert f"#   moc train {name}" in text
    assert max(map(len, text.splitlines())) <= 100
    assert not re.search(r"#.*[0-9] (steps|epochs)", text)  # the keys say it, and stay true
    assert Recipe.model_validate(yaml.safe_load(dump(recipe))) == recipe
    assert name == "quickstart" or name.rsplit("/", 1)[-1] == recipe.method.name


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_shipped_sweep_is_valid(path: Path) -> None:
    assert f"#   moc sweep {path.stem}" in path.read_text(encoding="utf-8")
    plan = make_plan(read_sweep(path.stem), [])
    names = [run.name for run in plan.runs]
    assert len(set(names)) == len(names) >= plan.total() > 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_can_take_the_place_of_the_recipes_own(path: Path, method: str) -> None:
    assert load_recipe(path, [f"method={method}"]).method == METHODS[method]()


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_numbers_are_read_alike_by_every_yaml_reader(path: Path) -> None:
    """PyYAML takes 1e-4 for a text, so shipped recipes write 1.0e-4."""
    values = re.findall(r"[:,{] *([-+0-9.]+e[-+0-9]+)", path.read_text(encoding="utf-8"))
    assert all(isinstance(yaml.safe_load(value), float) for value in values)


BASE = {
    "sst2": (128, 50, 5e-4),
    "mrpc": (128, 30, 4e-4),
    "cola": (64, 80, 3e-4),
    "qnli": (256, 25, 4e-4),
    "rte": (128, 80, 4e-4),
    "stsb": (128, 40, 4e-4),
}
LARGE = {
    "sst2": (64, 20, 4e-4),
    "mrpc": (32, 30, 3e-4),
    "cola": (32, 20, 5e-4),
    "qnli": (32, 10, 3e-4),
    "rte": (64, 20, 4e-4),
    "stsb": (32, 10, 3e-4),
}


@pytest.mark.parametrize("family", ["roberta", "deberta-v3"])
@pytest.mark.parametrize(("size", "table"), [("base", BASE), ("large", LARGE)])
def test_glue_settings_are_the_papers(
    family: str, size: str, table: dict[str, tuple[int, int, float]]
) -> None:
    for task, expected in table.items():
        recipe = load_recipe(f"glue/{family}-{size}/moc", [f"data.tasks={task}"])
        train = recipe.train
        found = (
            train.per_device_train_batch_size,
            train.num_train_epochs,
            train.learning_rate,
        )
        assert found == expected, task
        assert recipe.data.max_length == 128
        assert (train.warmup_ratio, train.weight_decay) == (0.06, 0.0)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        ("llama2-7b", 16),
        ("llama3-8b", 16),
        ("mistral-7b-instruct-v0.3", 16),
        ("qwen2.5-14b-instruct", 12),
    ],
)
def test_commonsense_settings_are_the_papers(model: str, batch: int) -> None:
    recipe = load_recipe(f"commonsense/{model}/moc")
    train, method = recipe.train, recipe.method
    assert train.per_device_train_batch_size == batch
    assert train.gradient_accumulation_steps == 2
    assert (train.learning_rate, train.num_train_epochs, train.weight_decay) == (3e-4, 3, 0.01)
    assert (method.rank, method.alpha, method.top_k) == (64, 0.95, 1)
    assert (method.gate.projection_dim, method.balance.weight) == (256, 0.01)
    assert len(recipe.data.tasks) == 8
    assert recipe.data.max_length == 256


def test_a_name_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_path = load_recipe(ROOT / "recipes" / "quickstart.yaml")
    for name in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml"):
        assert load_recipe(name) == by_path
    Path("quickstart").mkdir()
    assert load_recipe("quickstart") == by_path
    Path("quickstart.yaml").write_text("seed: x\n")
    with refused(RecipeError):
        load_recipe("quickstart.yaml")  # a file of one's own comes first


def test_recipes_are_found_inside_a_wheel(tmp_path: Path) -> None:
    """In a wheel they lie in moc_cli/_recipes, as pyproject.toml says."""
    wheel = (ROOT / "pyproject.toml").read_text()
    for path in (*FILES, *SWEEPS):
        part = path.relative_to(ROOT / "recipes").parts[0]
        assert f'"recipes/{part}" = "moc_cli/_recipes/{part}"' in wheel
    package = tmp_path / "moc_cli"
    shutil.copytree(ROOT / "moc_cli" / "recipe", package / "recipe")
    shutil.copytree(ROOT / "recipes", package / "_recipes")
    for name in ("__init__.py", "errors.py"):
        shutil.copy(ROOT / "moc_cli" / name, package / name)
    code = (
        "from moc_cli.recipe.catalog import entries, folder;"
        "from moc_cli.recipe.load import load_recipe;"
        "print(folder(), len(entries()), load_recipe('quickstart').seed)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(package / "_recipes"), str(len(FILES)), "42"]
