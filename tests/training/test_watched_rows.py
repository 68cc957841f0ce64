"""What is said of the rows that are watched, or held out for nobody."""

from support.rows import pair_rows, write_rows

from moc_cli.data.examples import TextExample
from moc_cli.data.splits import Splits, read_splits
from moc_cli.recipe.load import load_recipe
from moc_cli.training.checks import watched_rows


def test_rows_that_are_held_out_for_nobody_are_told():
    splits = Splits([TextExample("t", "a")], [TextExample("t", "b")], {})
    keys = ["eval.eval_strategy=no", "output.output_dir=run"]
    (note,) = watched_rows(load_recipe("commonsense/llama3-8b/moc", keys), splits)
    assert "held out (data.held_out: 120), but are never scored" in note
    assert watched_rows(load_recipe("glue/roberta-base/moc", keys), splits) == []
    keys = ["eval.eval_strategy=epoch", "output.output_dir=run"]
    (note,) = watched_rows(load_recipe("commonsense/llama3-8b/moc", keys), splits)
    assert note == "1 validation rows select the best step"


def test_scored_rows_choose_nothing_where_training_rows_are_held_out(tmp_path):
    """GLUE has no labels for its test rows, so that its validation rows are the scored ones."""
    rows = pair_rows(11, [0, 1])
    write_rows(tmp_path / "rte" / "train.jsonl", rows[:8])
    write_rows(tmp_path / "rte" / "validation.jsonl", rows[8:])
    keys = ["data.tasks=[rte]", f"data.path={tmp_path}", "data.held_out=2", "output.output_dir=run"]

    def read(split):
        data = load_recipe("glue/minilm/moc", [*keys, f"data.eval_split={split}"]).data
        return read_splits(data)[1]

    own, held_out = read("validation"), read("held_out")
    assert own.validation == own.tests["rte"] == held_out.tests["rte"]
    assert len(own.train) == 8
    assert len(held_out.train) == 6
    assert sorted(map(str, held_out.train + held_out.validation)) == sorted(map(str, own.train))
