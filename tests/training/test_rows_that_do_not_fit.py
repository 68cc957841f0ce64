"""Rows too long for the model, and rows that lose their answer: named, counted, no run stopped."""

import json
from pathlib import Path

import pytest
from support.models import make_byte_tokenizer, make_tiny_model

from moc_cli.cli import run
from moc_cli.data.custom.frame import instruction_prompt
from moc_cli.data.examples import ChoiceExample, InstructionExample, row_hashes
from moc_cli.errors import DataError
from moc_cli.kinds import Choice, Instruction, Writing
from moc_cli.methods import TextModel, bare
from moc_cli.runs import RunFolder
from moc_cli.scoring.results import ScoringOptions

POSITIONS = 256


def write(path: Path, rows: list[tuple[str, str]]) -> None:
    lines = [
        json.dumps({"instruction": prompt, "output": output}) + "\n" for prompt, output in rows
    ]
    path.write_text("".join(lines))


@pytest.fixture
def folder(tmp_path):
    """A model of 256 positions, and rows: the third to score has a prompt that is too long."""
    make_tiny_model("llama", max_position_embeddings=POSITIONS).save_pretrained(tmp_path / "model")
    make_byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    write(tmp_path / "rows" / "train.jsonl", [(f"say{n}", "ja") for n in range(12)])
    test = [(f"say{n}", "ja") for n in range(5)]
    test[2] = ("x" * POSITIONS, "ja")
    write(tmp_path / "rows" / "test.jsonl", test)
    return tmp_path


def arguments(folder: Path, *changes: str) -> list[str]:
    sets = [f"model.model_name_or_path={folder / 'model'}", f"data.path={folder / 'rows'}"]
    sets += ["method.rank=2", "method.gate.projection_dim=4", "eval.before=false"]
    sets += ["data.max_length=256", "data.held_out=0", "train.max_steps=4", "eval.eval_strategy=no"]
    sets += ["train.per_device_train_batch_size=3", "output.logging_steps=1", *changes]
    flags = [part for change in sets for part in ("--set", change)]
    return ["train", "custom/world-llama/moc", *flags, "--output-dir", str(folder / "run")]


def test_each_row_has_its_own_limit():
    """The longest prompt and the longest output are of different rows, and all rows fit."""
    model = make_tiny_model("llama", max_position_embeddings=64, seed=3)
    model = TextModel(bare(model), make_byte_tokenizer())
    rows = [("p" * 50, "ja"), ("p", "o" * 50), ("pp", "oo"), ("ppp", "o" * 20)]
    examples = [InstructionExample("t", prompt, output) for prompt, output in rows]
    kind, options = Instruction(), ScoringOptions(4, 64, "texts")
    assert kind.too_long(examples, model.tokenizer, options, 64) == {}
    together = kind.score(model, examples, options).items
    alone = [kind.score(model, [example], options).items[0] for example in examples]
    assert [item.prediction for item in together] == [item.prediction for item in alone]
    assert len(together[0].prediction) <= 6  # three tokens, of at most two letters
    too_long = InstructionExample("t", "p" * 50, "o" * 14)
    assert kind.too_long([examples[0], too_long], model.tokenizer, options, 64) == {1: 65}


def test_a_row_too_long_is_named_before_training_left_out_and_counted(folder, capsys):
    named = "test.jsonl, line 3: prompt and output have more tokens than the 256 that the model"
    assert run([*arguments(folder), "--dry-run"]) == 0
    captured = capsys.readouterr()
    assert named in captured.err
    assert "left out: of test 1 with more tokens than the model takes" in " ".join(
        captured.out.split()
    )
    assert run(arguments(folder)) == 0
    assert named in capsys.readouterr().err
    results = RunFolder(folder / "run").read_results()
    assert results["tasks"]["custom"]["metrics"]["exact_match"]["n"] == 4
    assert results["dropped"]["test"] == {"more tokens than the model takes": 1}
    assert run(["eval", str(folder / "run")]) == 0
    assert named in capsys.readouterr().err
    lines = (folder / "run" / "eval" / "texts" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 3, 4]
    command = ["inspect-routing", str(folder / "run")]
    assert run([*command, "--limit", "5"]) == 0
    assert named in capsys.readouterr().err
    assert run([*command, "--text", "x" * 300]) == 2
    assert "the text has 300 tokens, the model takes 256" in capsys.readouterr().err
    refused = arguments(folder, "eval.too_long=refuse")
    assert run([*refused, "--dry-run"]) == 2
    assert named in capsys.readouterr().err


def test_only_rows_that_are_scored_are_counted_as_trained(folder, tmp_path, capsys):
    assert run(arguments(folder)) == 0
    trained = folder / "run" / "trained_rows.txt"
    (prompt, *_) = [json.loads(line) for line in (folder / "rows" / "test.jsonl").open()][2:3]
    long, short = (
        InstructionExample("custom", instruction_prompt(text), "ja")
        for text in (prompt["instruction"], "say0")
    )
    trained.write_text("".join(f"{line}\n" for line in row_hashes([long])))
    capsys.readouterr()
    assert run(["eval", str(folder / "run")]) == 0
    assert "was trained on" not in capsys.readouterr().err
    trained.write_text("".join(f"{line}\n" for line in row_hashes([long, short])))
    assert run(["eval", str(folder / "run")]) == 0
    assert "was trained on 1 of the 4 rows to score" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["validation", "test"])
def test_a_part_that_loses_every_answer_is_refused(folder, capsys, part):
    """Also where the task has the name of the part that is watched."""
    for name in ("validation", "test"):
        prompt = "x" * 60 if name == part else "say"
        write(folder / "rows" / f"{name}.jsonl", [(prompt, "ja")] * 3)
    changes = ["data.max_length=190", f"data.tasks=[{part}]"]
    assert run([*arguments(folder, *changes), "--dry-run"]) == 2
    assert f"cuts off the answer of every row of '{part}'" in capsys.readouterr().err


def test_rows_that_lose_their_answer_train_nothing_and_are_left_out(folder, capsys):
    long = "x" * POSITIONS
    write(folder / "rows" / "train.jsonl", [(long if n % 2 else "say", "ja") for n in range(12)])
    assert run([*arguments(folder), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["rows"], plan["truncated"]) == (6, 0)
    assert plan["dropped"]["train"] == {"no answer left within data.max_length": 6}
    assert run(arguments(folder)) == 0
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    assert all(line["loss"] > 1 for line in lines if "loss" in line)
    assert len(RunFolder(folder / "run").read_trained_rows()) == 1  # six times the same
    write(folder / "rows" / "train.jsonl", [(long, "ja")] * 6)
    assert run([*arguments(folder), "--dry-run"]) == 2
    assert "cuts off the answer of every training row" in capsys.readouterr().err


def test_a_run_that_cannot_be_scored_is_finished_all_the_same(folder, capsys, monkeypatch):
    score = Writing.score

    def refuse(*_):
        raise DataError("this cannot be scored")

    monkeypatch.setattr(Writing, "score", refuse)
    for more in ([], ["--resume", "auto"]):
        assert run([*arguments(folder), *more]) == 2
        error = capsys.readouterr().err
        assert "finished and kept, but not all of it is scored: custom: this cannot" in error
        results = RunFolder(folder / "run").read_results()
        assert (results["status"], results["steps"], results["tasks"]) == ("finished", 4, {})
        assert results["unscored"] == {"custom": "this cannot be scored"}
    monkeypatch.setattr(Writing, "score", score)
    assert run([*arguments(folder), "--resume", "auto"]) == 0
    assert "unscored" not in RunFolder(folder / "run").read_results()


def test_questions_are_measured_by_the_protocol_that_scores_them():
    tokenizer = make_byte_tokenizer()
    example = ChoiceExample("boolq", "abcd", 2, "ab", ("c", "efg"), 0)
    for protocol, tokens in (("rank", 5), ("generate", 34)):
        options = ScoringOptions(protocol=protocol)
        assert Choice().too_long([example], tokenizer, options, tokens) == {}
        assert Choice().too_long([example], tokenizer, options, tokens - 1) == {0: tokens}
