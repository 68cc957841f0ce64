"""Custom datasets from the command line to results.json and back by `moc eval`, tiny models."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch
from support.models import make_byte_tokenizer, make_tiny_model
from support.rows import write_rows
from support.tiny_runs import save_model
from torch.nn.functional import cross_entropy

from moc_cli.cli import run
from moc_cli.cli.eval import read_options
from moc_cli.cli.try_next import use_commands
from moc_cli.data.custom.frame import instruction_prompt
from moc_cli.data.examples import ChatExample, InstructionExample, TextExample
from moc_cli.errors import RunError
from moc_cli.kinds import KINDS as CLASSES
from moc_cli.load_run import open_run
from moc_cli.methods import TextModel, attach
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.methods import MocMethod
from moc_cli.recipe.tasks import LANGUAGE
from moc_cli.runs import RunFolder
from moc_cli.scoring.results import ScoringOptions
from moc_cli.training.changes import is_finished
from moc_cli.training.checkpoint import Checkpoints, read_checkpoint

COLOURS = ("red", "blue", "green")
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    write_rows(path, rows)
    return path


def write_csv(path: Path, header: list[str], rows: list[tuple]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def instructions(folder: Path) -> Path:
    rows = [{"instruction": f"Say {n}", "input": "", "output": "ja"} for n in range(24)]
    return write_jsonl(folder / "rows.jsonl", rows)


def chats(folder: Path) -> Path:
    rows = []
    for n in range(24):
        turns = [("user", f"Colour {n}?"), ("assistant", COLOURS[n % 3]), ("user", "Sure?")]
        turns.append(("assistant", "yes"))
        rows.append({"messages": [{"role": role, "content": said} for role, said in turns]})
    return write_jsonl(folder / "rows.jsonl", rows)


def texts(folder: Path) -> Path:
    return write_csv(folder / "rows.csv", ["text"], [(f"abab abab {n}",) for n in range(24)])


def reviews(folder: Path) -> Path:
    rows = [(COLOURS[n % 2] * 2 + f" {n}", COLOURS[n % 2]) for n in range(24)]
    return write_csv(folder / "rows.csv", ["sentence", "colour"], rows)


def amounts(folder: Path) -> Path:
    rows = [(f"{'a' * (n % 4)}b {n}", "so", n % 4 + 0.5) for n in range(24)]
    return write_csv(folder / "rows.csv", ["sentence1", "sentence2", "score"], rows)


KINDS = {
    "instruction": (instructions, "llama", ["exact_match", "perplexity"]),
    "chat": (chats, "llama", ["perplexity"]),
    "text": (texts, "llama", ["perplexity"]),
    "classification": (reviews, "bert", ["accuracy"]),
    "regression": (amounts, "bert", ["pearson", "spearman"]),
}


def recipe(folder: Path, kind: str, extra: str = "") -> list[str]:
    """Arguments of a tiny run on rows of a kind, with its model below `folder`."""
    make, family, _ = KINDS[kind]
    save_model(folder / "model", family)
    if family == "llama":
        tokenizer = make_byte_tokenizer()
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(folder / "model")
    path = make(folder)
    file = folder / "recipe.yaml"
    file.write_text(
        f"""
model: {{model_name_or_path: {folder}/model}}
method: {{name: moc, rank: 4, gate: {{projection_dim: 8}}}}
data: {{suite: custom, path: {path}, held_out: 6, max_length: 300{extra}}}
train: {{max_steps: 12, per_device_train_batch_size: 6, learning_rate: 2.0e-2}}
eval: {{eval_strategy: steps, eval_steps: 6}}
output: {{output_dir: {folder}/run, logging_steps: 6, save_steps: 6}}
launch: {{device: cpu, num_threads: 1}}
"""
    )
    return ["train", str(file)]


@pytest.mark.parametrize("kind", KINDS)
def test_own_rows_are_trained_on_and_scored_and_scored_again(kind, tmp_path, capsys):
    extra = ", columns: {label: colour}" if kind == "classification" else ""
    arguments = recipe(tmp_path, kind, extra)
    assert run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    scores = found["tasks"]["custom"]["metrics"]
    assert list(scores) == KINDS[kind][2]
    assert all(one["n"] == 6 for one in scores.values())
    assert (found["scored_split"], found["dropped"]) == ("held_out", {})
    assert found["protocol"] == ("texts" if "perplexity" in scores else "classify")
    if "perplexity" in scores:
        assert scores["perplexity"]["value"] < scores["perplexity"]["before"]
        assert scores["perplexity"]["majority"] is None
        assert found["votes"]
    else:
        main = KINDS[kind][2][0]
        assert scores[main]["value"] > 0.5
    kept = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert kept.data.format == kind
    purposes = [purpose for _, purpose in use_commands(str(tmp_path / "run"), kept)]
    assert ("text of the trained model" in purposes) == ("perplexity" in scores)
    assert kept.data.labels == (["blue", "red"] if kind == "classification" else None)
    opened = open_run(tmp_path / "run")
    assert (opened.kind.head is LANGUAGE) == (KINDS[kind][1] == "llama")

    assert (
        run(["eval", str(tmp_path / "run"), "--json", "--output-dir", str(tmp_path / "eval")]) == 0
    )
    again = json.loads(capsys.readouterr().out)
    assert {name: one["value"] for name, one in again["tasks"]["custom"]["metrics"].items()} == {
        name: pytest.approx(one["value"], rel=1e-5) for name, one in scores.items()
    }
    lines = (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 6


def test_an_output_learned_by_heart_matches(tmp_path, capsys):
    more = ["--set", "train.max_steps=40", "--set", "eval.eval_strategy=no", "--json"]
    assert run([*recipe(tmp_path, "instruction"), *more]) == 0
    scores = json.loads(capsys.readouterr().out)["tasks"]["custom"]["metrics"]
    assert scores["exact_match"]["before"] == 0
    assert scores["exact_match"]["value"] == 1
    assert scores["exact_match"]["majority"] == 1
    other = write_jsonl(
        tmp_path / "other.jsonl",
        [{"instruction": "Say 3", "output": " ja "}, {"instruction": "Say 4", "output": "nein"}],
    )
    command = [
        "eval",
        str(tmp_path / "run"),
        "--path",
        str(other),
        "--output-dir",
        str(tmp_path / "o"),
    ]
    assert run([*command, "--base", "--json"]) == 0
    printed = capsys.readouterr()
    assert f"custom: {other} has no column 'input'" in printed.err
    entry = json.loads(printed.out)["tasks"]["custom"]
    assert entry["metric"] == "exact_match"
    assert entry["metrics"]["exact_match"]["value"] == 0.5
    assert entry["metrics"]["exact_match"]["base"] == 0
    items = [json.loads(line) for line in (tmp_path / "o" / "samples.jsonl").open()]
    assert [(i["label"], i["prediction"], i["correct"]) for i in items] == [
        ("ja", "ja", True),
        ("nein", "ja", False),
    ]


def test_scores_of_other_rows_replace_no_others(tmp_path, capsys):
    arguments = recipe(tmp_path, "text")
    assert run(arguments) == 0
    command = ["eval", str(tmp_path / "run"), "--json"]

    def path_of_scores(*options: str) -> tuple[str, str | None]:
        assert run([*command, *options]) == 0
        found = json.loads(capsys.readouterr().out)
        asked = read_options([*command[1:-1], *options])
        data = load_recipe(tmp_path / "run" / "recipe.yaml").data
        assert asked.label("texts", data) == Path(found["folder"]).name
        return Path(found["folder"]).name, found["path"]

    capsys.readouterr()
    own = ["--path", str(tmp_path / "rows.csv")]
    assert path_of_scores() == path_of_scores(*own) == ("texts", None)
    kept = (tmp_path / "run" / "eval" / "texts" / "results.json").read_bytes()
    one = write_jsonl(tmp_path / "my new.rows.jsonl", [{"text": "abab"}] * 3)
    name = "texts-my-new.rows-limit-2"
    assert path_of_scores("--path", str(one), "--limit", "2") == (name, str(one))
    two = write_jsonl(tmp_path / "two" / one.name, [{"text": "baba"}] * 3)
    assert run([*command, "--path", str(two), "--limit", "2"]) == 0
    printed = capsys.readouterr()
    assert "other path than before: its scores are replaced" in printed.err
    assert json.loads(printed.out)["path"] == str(two)
    assert (tmp_path / "run" / "eval" / "texts" / "results.json").read_bytes() == kept


def test_a_dry_run_shows_a_row_of_ones_own(tmp_path, capsys):
    arguments = [*recipe(tmp_path, "chat"), "--dry-run"]
    assert run([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    answers = [piece["text"] for piece in shown["row"]["pieces"] if piece["target"]]
    assert answers[0].removesuffix("</s>") in COLOURS
    assert answers[1] == "yes</s>"
    assert (shown["rows"], shown["truncated"]) == (18, 0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text() + "\n")
    assert run(arguments) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "left out: of train 1 with a blank line" in shown
    rows.write_text(rows.read_text() + '{"messages": 1}\n')
    assert run(arguments) == 2
    assert f"{rows}, line 26: 'messages' is 1, not a list" in capsys.readouterr().err


def test_a_dry_run_names_the_class(tmp_path, capsys):
    arguments = recipe(tmp_path, "classification", ", columns: {label: colour}")
    assert run([*arguments, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["row"]["label"] in COLOURS[:2]


def test_a_bad_chat_is_told_before_weights_are_read(tmp_path, capsys):
    arguments = recipe(tmp_path, "chat")
    (tmp_path / "model" / "model.safetensors").unlink()
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    tokenizer.save_pretrained(tmp_path / "model")
    assert run(arguments) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path}/rows.jsonl, lines 1-24: the chat template refuses it: never" in told


def test_a_run_on_own_rows_is_resumed_only_with_the_same_rows(tmp_path, capsys):
    arguments = recipe(tmp_path, "text")
    assert run([*arguments, "--json", "--set", "train.max_steps=6"]) == 0
    assert run([*arguments, "--resume", "auto", "--json"]) == 0
    assert RunFolder.open(tmp_path / "run").read_results()["steps"] == 12
    write_csv(tmp_path / "rows.csv", ["text"], [(f"other {n}",) for n in range(24)])
    capsys.readouterr()
    assert run([*arguments, "--resume", "auto"]) == 2
    assert "the rows changed since the checkpoint" in " ".join(capsys.readouterr().err.split())


def test_the_columns_that_were_read_make_no_other_run(tmp_path):
    """A run's recipe names them; the user's does not, nor a checkpoint of older versions."""
    arguments = recipe(tmp_path, "regression")
    assert run([*arguments, "--json", "--set", "train.max_steps=6"]) == 0
    folder = RunFolder.open(tmp_path / "run")
    assert load_recipe(folder.recipe_file).data.columns.text_pair == "sentence2"
    shorter = load_recipe(Path(arguments[1]), ["train.max_steps=6"])
    assert is_finished(shorter, folder)
    other = load_recipe(Path(arguments[1]), ["train.max_steps=6", "data.columns.label=other"])
    with pytest.raises(RunError, match="data.columns.label .score then, other now"):
        is_finished(other, folder)
    checkpoints = Checkpoints(folder.checkpoints, None)
    snapshot = read_checkpoint(checkpoints.path(6))
    columns = snapshot.identity["recipe"]["data"]["columns"]
    assert columns["label"] == "score"
    columns.update(dict.fromkeys(columns))
    checkpoints.save(snapshot)
    assert run([*arguments, "--resume", "auto", "--json"]) == 0
    assert folder.read_results()["steps"] == 12


def test_what_does_not_go_with_the_found_format_is_refused(tmp_path, capsys):
    arguments = recipe(tmp_path, "text")
    assert run([*arguments, "--set", "eval.metric_for_best_model=accuracy"]) == 2
    assert "format 'text' has no accuracy; allowed: perplexity, loss" in capsys.readouterr().err
    (tmp_path / "test.csv").write_text("text\nx\n")
    (tmp_path / "rows.csv").rename(tmp_path / "train.csv")
    whole = ["--set", f"data.path={tmp_path}", "--set", "data.held_out=0"]
    assert run([*arguments, *whole]) == 2
    assert "evaluation during training needs a validation file" in capsys.readouterr().err


def test_all_rows_may_be_trained_on_and_none_scored(tmp_path, capsys):
    arguments = [*recipe(tmp_path, "text"), "--set", "data.held_out=0"]
    arguments += ["--set", "eval.eval_strategy=no", "--set", "train.max_steps=2"]
    assert run([*arguments, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert (results["tasks"], results["average"], results["scored_split"]) == ({}, None, "none")
    assert run([*arguments, "--overwrite"]) == 0
    assert "no rows are scored" in capsys.readouterr().err


def test_an_encoder_writes_no_text(tmp_path, capsys):
    arguments = recipe(tmp_path, "classification", ", columns: {label: colour}")
    write_csv(tmp_path / "rows.csv", ["sentence"], [("a",), ("b",)])
    told = [*arguments, "--set", "data.columns.label=null", "--set", "data.held_out=1"]
    assert run([*told, "--dry-run"]) == 2
    assert "format 'text' is learned by a language model" in capsys.readouterr().err


# Scores against a computation of their own


class Recorded:
    """A model whose votes are written down."""

    def __init__(self, adapted) -> None:
        self.adapted, self.model, self.masks = adapted, adapted.model, []

    def attempt(self):
        return self.adapted.attempt()

    def voting(self, mask):
        self.masks.append(mask.clone())
        return self.adapted.voting(mask)


def adapted_llama():
    adapted = attach(make_tiny_model("llama"), MocMethod(rank=4, alpha=0.3), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_trainables().items():
            if name.endswith(".B"):
                parameter.normal_(0, 0.3)
    adapted.model.eval()
    return adapted


def examples(kind: str) -> list:
    if kind == "text":
        return [TextExample("t", text) for text in ("hello there", "a", "one more text")]
    if kind == "chat":
        turns = (("user", "Hi"), ("assistant", "Ho"), ("user", "Well?"), ("assistant", "Bye"))
        return [ChatExample("t", turns), ChatExample("t", (("user", "abc"), turns[1]))]
    return [InstructionExample("t", instruction_prompt(w), w) for w in ("red", "lilac")]


@pytest.mark.parametrize("kind", ["text", "chat", "instruction"])
def test_perplexity_is_that_of_each_row_alone_with_given_tokens_voting(kind):
    tokenizer, adapted = make_byte_tokenizer(), adapted_llama()
    tokenizer.chat_template = TEMPLATE
    rows = examples(kind)
    watched = Recorded(adapted)
    found = CLASSES[kind]().score(TextModel(watched, tokenizer), rows, ScoringOptions(2, 300))
    losses, tokens, givens = [], [], []
    for row in rows:
        if kind == "chat":
            text = "".join(f"<s>{role}:{said}</s>" for role, said in row.messages)
            given = len(tokenizer(f"<s>user:{row.messages[0][1]}</s><s>assistant:")["input_ids"])
            asides = [f"<s>{role}:" for role, _ in row.messages]
            asides += [f"{said}</s>" for role, said in row.messages if role == "user"]
        else:
            text = row.train_text + "</s>"
            given = 1 if kind == "text" else len(tokenizer(row.prompt)["input_ids"])
        ids = tokenizer(text)["input_ids"]
        wanted = [place >= given for place in range(len(ids))]
        if kind == "chat" and len(row.messages) == 4:
            later = tokenizer("<s>user:Well?</s><s>assistant:")["input_ids"]
            first = len(ids) - len(tokenizer("Bye</s>")["input_ids"]) - len(later)
            wanted[first : first + len(later)] = [False] * len(later)
        votes = torch.tensor([[int(place < given) for place in range(len(ids))]])
        with torch.no_grad(), adapted.voting(votes):
            logits = adapted.model(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)))
        each = cross_entropy(logits.logits[0, :-1], torch.tensor(ids[1:]), reduction="none")
        kept = torch.tensor(wanted[1:])
        losses.append(each[kept].sum().item())
        tokens.append(int(kept.sum()))
        givens.append(given)
    assert [item.tokens for item in found.items] == tokens
    assert [item.loss for item in found.items] == pytest.approx(losses, rel=1e-4)
    result = found.metrics["perplexity"]
    assert result.value == pytest.approx(math.exp(sum(losses) / sum(tokens)), rel=1e-4)
    voters = [count for mask in watched.masks for count in mask.sum(1).tolist()]
    assert sorted(voters) == sorted(givens)
