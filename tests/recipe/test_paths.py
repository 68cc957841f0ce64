"""Local paths in a recipe: absolute in the run's recipe, and told apart from words and texts."""

from pathlib import Path

from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.paths import absolute_path, absolute_paths

OWN = f"{'Answer with care. ' * 40}\n{{instruction}}\n"


def test_the_text_of_a_template_is_no_path(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute_path(OWN) == OWN
    Path("own.txt").write_text(OWN)
    changes = ["data.suite=custom", "data.path=rows.csv", "data.tasks=own"]
    file = load_recipe("quickstart", [*changes, "data.template=own.txt"])
    assert absolute_paths(file).data.template == str(tmp_path / "own.txt")


def test_a_word_is_no_folder_of_that_name(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("alpaca", "chatml", "tool_use"):
        Path(name).mkdir()
    for word in ("chatml", "tool_use"):  # the second may be one of the tokenizer's
        changes = ["data.suite=custom", "data.path=alpaca", f"data.chat_template={word}"]
        data = absolute_paths(load_recipe("quickstart", [*changes, "data.tasks=own"])).data
        assert (data.template, data.chat_template) == ("alpaca", word)
        assert data.path == str(tmp_path / "alpaca")
