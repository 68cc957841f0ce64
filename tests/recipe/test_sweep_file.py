"""A sweep file: what it says, and every mistake in it at once."""

from pathlib import Path

import pytest
from support.messages import refused

from moc_cli.errors import MocError, RecipeError
from moc_cli.recipe.sweep import check_reference, parse_vary, read_sweep

TEXT = """\
recipe: quickstart
set: {eval.before: false}
vary:
  data.tasks: [[a], [b]]
  method:
    control: {method: control, method.rank: 16}
    moc: {}
  train.learning_rate: [3.0e-4, 1.0e-3]
seeds: [3, 1]
choose: train.learning_rate
reference: control
"""


def write(folder: Path, text: str) -> str:
    path = folder / "grid.yaml"
    path.write_text(text)
    return str(path)


def test_it_says_what_runs_there_are(tmp_path: Path) -> None:
    sweep = read_sweep(write(tmp_path, TEXT))
    assert (sweep.name, sweep.recipe, sweep.seeds) == ("grid", "quickstart", (3, 1))
    assert sweep.common == ("eval.before=false",)
    assert [[one.name for one in cell] for cell in sweep.cells] == [
        ['["a"]', "control"],
        ['["a"]', "moc"],
        ['["b"]', "control"],
        ['["b"]', "moc"],
    ]
    assert sweep.cells[0][1].changes == ("method=control", "method.rank=16")
    assert [one and one.changes for one in sweep.candidates] == [
        ("train.learning_rate=0.0003",),
        ("train.learning_rate=0.001",),
    ]
    assert (sweep.compared_group, sweep.row(sweep.cells[0])) == ("method", '["a"]')
    assert sweep.output_dir == "runs/sweeps/grid"
    assert sweep.choose_seeds == 1
    two = read_sweep(write(tmp_path, TEXT + "choose_seeds: 2\n"))
    assert two.choose_seeds == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("recipe: quickstart", "recipes: quickstart"),
        ("[3, 1]", "[3, 3]"),
        ("[3, 1]", "3"),
        ("choose: train", "choose: trains"),
        ("reference: control", "choose_seeds: 3"),
        ("reference: control", "choose_seeds: true"),
        ("choose: train.learning_rate", "choose_seeds: 2"),
        ("reference: control", "reference: controls"),
        ("moc: {}", "moc: 3"),
        ("[[a], [b]]", "[[a], [a]]"),
        ("[[a], [b]]", "a"),
    ],
)
def test_mistakes_have_their_line(tmp_path: Path, old: str, new: str) -> None:
    assert old in TEXT
    with refused(RecipeError):
        read_sweep(write(tmp_path, TEXT.replace(old, new)))


def test_a_reference_names_one_value() -> None:
    assert check_reference("r2", ["r2", "r4"]) is None
    assert check_reference("r2", ["r2", "r4", "r2"]) == "several values have this name"


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    text = "set: 3\nvary: {}\nseeds: x\neval: x\nresults_dir: 3\n"
    with refused(RecipeError):
        read_sweep(write(tmp_path, text))


def test_a_name_that_no_sweep_has_is_told_with_the_nearest() -> None:
    with refused(RecipeError):
        read_sweep("glue-minilms")


def test_values_of_vary() -> None:
    assert parse_vary("method.top_k=1,3") == ("method.top_k", [1, 3])
    with refused(MocError):
        parse_vary("method.top_k")
