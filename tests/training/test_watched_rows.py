"""What is said of the rows that are watched, or held out for nobody."""

from moc_cli.data.examples import TextExample
from moc_cli.data.splits import Splits
from moc_cli.recipe.load import load_recipe
from moc_cli.training.checks import watched_rows


def test_rows_that_are_held_out_for_nobody_are_told():
    splits = Splits([TextExample("t", "a")], [TextExample("t", "b")], {})
    keys = ["eval.eval_strategy=no", "output.output_dir=run"]
    (note,) = watched_rows(load_recipe("commonsense/llama3-8b/moc", keys), splits)
    assert "held out (data.held_out: 120), and nothing watches them" in note
    assert watched_rows(load_recipe("glue/roberta-base/moc", keys), splits) == []
    keys = ["eval.eval_strategy=epoch", "output.output_dir=run"]
    (note,) = watched_rows(load_recipe("commonsense/llama3-8b/moc", keys), splits)
    assert note == "1 rows are watched and pick the best step"
