"""`moc eval` as a user calls it: what it writes, what it shows, and what it refuses."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from support.messages import refused
from support.models import make_pair_tokenizer, make_tiny_model
from support.tracing import traced
from torch._dynamo.utils import counters

from moc_cli.cli import run
from moc_cli.data.commonsense import make_example
from moc_cli.data.splits import TaskRows
from moc_cli.errors import FileError, MocError
from moc_cli.evaluation import session
from moc_cli.evaluation.base_scores import BaseScore, find_score
from moc_cli.evaluation.job import EvalJob
from moc_cli.evaluation.results_folder import ResultsFolder, check_results_folder, prompt_hash
from moc_cli.kinds import Choice
from moc_cli.load_run import LoadedModel
from moc_cli.methods import bare
from moc_cli.models import compiler, load
from moc_cli.recipe.sections import DataSection
from moc_cli.report.score_tables import evaluation_table
from moc_cli.results import main_score
from moc_cli.scoring.results import ScoringOptions

LIMIT = 24
ENTRY = {
    "metric": "f1",
    "metrics": {"f1": {"value": 0.5, "stderr": None, "majority": None, "n": 1}},
    "limited": False,
}
SAMPLE = {"row": 0, "prompt": "a"}
SMALL = ("train.max_steps=3", f"eval.max_samples={LIMIT}", "launch.num_threads=1")


def train(folder: Path, *changes: str) -> Path:
    options = [word for change in (*SMALL, *changes) for word in ("--set", change)]
    assert run(["train", "quickstart", "--json", "--output-dir", str(folder), *options]) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps, scored on 24 rows; its evaluations go elsewhere."""
    return train(tmp_path_factory.mktemp("runs") / "ranked")


Answer = Callable[..., dict[str, Any]]


@pytest.fixture
def answer(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch) -> Answer:
    """`answer("RUN", ...)`: what `moc eval ... --json` prints, in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def ask(*words: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert run(["eval", *map(str, words), "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return ask


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").open()]


def test_the_same_rows_score_as_after_training(trained: Path, tmp_path: Path, answer) -> None:
    """The limit draws the rows of the final score, so base and value are those of the run."""
    own = json.loads((trained / "results.json").read_text())["tasks"]["world"]
    found = answer(trained, "--limit", LIMIT, "--output-dir", tmp_path / "out")
    task = found["tasks"]["world"]
    score, own_score = main_score(task), main_score(own)
    assert score | {"before": score["base"]} == own_score | {"base": own_score["before"]}
    assert score["n"] == LIMIT
    assert task["base_source"] == "before training"
    averages = (found["average"], found["average_of_base"])
    assert averages == (own_score["value"], own_score["before"])
    assert (found["protocol"], found["limit"], found["limited"]) == ("rank", LIMIT, True)
    assert (task["rows"], task["limited"], task["halved"]) == (432, True, 0)
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {key: written[key] for key in found if key != "folder"} == {
        key: value for key, value in found.items() if key != "folder"
    }
    lines = samples(tmp_path / "out")
    assert len(lines) == LIMIT
    assert sum(line["correct"] for line in lines) == round(own_score["value"] * LIMIT)
    for line in lines:
        best, second = sorted(line["scores"])[:-3:-1]
        assert line["margin"] == pytest.approx(best - second)
        assert line["prediction"] == line["scores"].index(best)


def test_other_rows_have_no_known_base(trained: Path, tmp_path: Path, answer) -> None:
    found = answer(trained, "--limit", LIMIT - 1, "--output-dir", tmp_path / "out")
    assert "base" not in main_score(found["tasks"]["world"])
    assert found["average_of_base"] is None


def test_a_bare_model_stands_beside_its_runs(trained: Path, tmp_path: Path, answer) -> None:
    """Scored by itself, scored with --base, and found again: the same numbers."""
    bare = answer("--model", "builtin:world-llama", "--limit", 30)
    assert bare["folder"] == "runs/eval/builtin--world-llama/builtin-rank-limit-30"
    task = bare["tasks"]["world"]
    beside = answer(trained, "--limit", 30, "--base", "--output-dir", "a")["tasks"]["world"]
    assert beside["base_source"] == "scored with it"
    assert main_score(beside)["base"] == main_score(task)["value"]
    found = answer(trained, "--limit", 30, "--output-dir", "b")["tasks"]["world"]
    assert main_score(found)["base"] == main_score(task)["value"]
    assert found["base_source"] == bare["folder"]
    lines = samples(tmp_path / "a")
    for line, other in zip(lines, samples(tmp_path / bare["folder"]), strict=True):
        assert line["prompt"] == other["prompt"]
        assert line["base"]["scores"] == pytest.approx(other["scores"], abs=1e-4)
    assert any(line["base"]["scores"] != line["scores"] for line in lines)


def test_answers_are_generated_in_training_and_after(tmp_path: Path, answer) -> None:
    """The recipe's protocol is that of the final score and the default of `moc eval`."""
    folder = train(tmp_path / "run", "eval.protocol=generate", "eval.max_samples=6")
    own = json.loads((folder / "results.json").read_text())
    assert own["protocol"] == "generate"
    found = answer(folder, "--limit", 6)
    task = found["tasks"]["world"]
    assert found["folder"] == str(folder / "eval" / "generate-limit-6")
    assert found["protocol"] == "generate"
    before = own["tasks"]["world"]
    assert task["unparsed"] == before["unparsed"]
    assert main_score(task)["value"] == main_score(before)["value"]
    assert main_score(task)["base"] == main_score(before)["before"]
    lines = samples(Path(found["folder"]))
    assert sum(line["answer"] is None for line in lines) == task["unparsed"]
    for line in lines:
        assert line["correct"] == (line["prediction"] == line["label"])
        assert (line["prediction"] is None) == (line["answer"] is None)
        assert line["answer"] is None or line["answer"] in line["output"]
    ranked = answer(folder, "--limit", 6, "--protocol", "rank")
    assert ranked["protocol"] == "rank"
    assert "base" not in main_score(ranked["tasks"]["world"])
    again = ["train", "quickstart", "--overwrite", "--json", "--output-dir", str(folder)]
    assert run([*again, *(word for change in SMALL for word in ("--set", change))]) == 0
    assert not (folder / "eval").exists()


def test_what_is_shown(
    trained: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["eval", str(trained), "--limit", "30", "--output-dir", "out", "--batch-size", "8"]
    assert run(words) == 0
    captured = capsys.readouterr()
    (row,) = [line for line in captured.out.splitlines() if line.startswith("world")]
    assert "30 of 432" in row
    assert "limited: not all rows are scored" in captured.out
    assert "rank, float32, cpu, batches of 8, trained on the answer" in captured.out
    assert "every item: out/samples.jsonl" in captured.err
    assert run([*words[:2], "--limit", "20", "--output-dir", "out"]) == 0
    assert "out: other limit than before: its scores are replaced" in capsys.readouterr().err
    assert len(samples(tmp_path / "out")) == 20


def test_compiled_generation_writes_the_same(trained: Path, tmp_path: Path, answer, capsys) -> None:
    device = ("--device", "cpu")
    generated = (trained, "--protocol", "generate", "--limit", 4, *device, "--output-dir")
    answer(*generated, tmp_path / "eager")
    words = [
        "generate",
        str(trained),
        *device,
        "--prompt",
        "Where is the key?",
        "--max-new-tokens",
        "9",
    ]
    texts, graphs = [], []
    with traced():
        found = answer(*generated, tmp_path / "compiled", "--torch-compile")
        graphs.append(counters["stats"]["unique_graphs"])
        for switch in ("--torch-compile", "--no-torch-compile"):
            counters.clear()
            assert run([*words, switch, "--json"]) == 0
            texts.append(json.loads(capsys.readouterr().out)["text"])
            graphs.append(counters["stats"]["unique_graphs"])
    assert samples(tmp_path / "compiled") == samples(tmp_path / "eager")
    assert found["protocol"] == "generate"
    assert texts[0] == texts[1]
    assert graphs[0]
    assert graphs[1]
    assert not graphs[2]


def test_a_missing_compiler_is_said_before_weights_load(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(session, "open_run", None)
    commands = (["eval", str(trained), "--protocol", "generate"], ["generate", "--prompt", "a"])
    for words in (commands[0], [*commands[1], str(trained)], [*commands[1], "--model", "m"]):
        assert run([*words, "--torch-compile", "--device", "cpu"]) == 2
        assert "--torch-compile needs a C++ compiler on the CPU" in capsys.readouterr().err


WRONG = {
    "nothing to score": (["--limit", "3"], ["give either a run folder or --model ID"]),
    "both": (["{run}", "--model", "m"], ["give either a run folder or --model ID"]),
    "no run": (["nowhere"], ["nowhere is not a run folder: it holds no recipe.yaml"]),
    "several at once": (
        ["{run}", "--protocol", "ranks", "--batch-size", "0", "--dtype", "float32", "--suite", "x"],
        [
            "--suite goes with --model; a run has its own",
            "--dtype goes with --model; a run has its own",
            "--protocol: found 'ranks'; did you mean 'rank'? allowed: rank, generate",
            "--batch-size: found '0'; allowed: auto, or a whole number of at least 1",
        ],
    ),
    "compiled": (
        ["{run}", "--torch-compile"],
        [
            "--torch-compile: compiles the generation of answers, and nothing is generated with "
            "protocol 'rank'"
        ],
    ),
    "compiled harness": (
        ["{run}", "--torch-compile", "--harness", "a"],
        ["--torch-compile: --harness generates without compiling"],
    ),
    "tasks": (
        ["{run}", "--tasks", "boolq, wurld"],
        [
            "--tasks: builtin has no task 'boolq'; it is one of commonsense's",
            "--tasks: builtin has no task 'wurld'; did you mean 'world'? allowed: world",
        ],
    ),
    "a task twice": (["{run}", "--tasks", "world,world"], ["--tasks: a task is named twice"]),
    "path of the builtin suite": (
        ["{run}", "--path", "."],
        ["--path: the builtin suite is inside this package"],
    ),
    "base of a base": (
        ["--model", "builtin:world-llama", "--base"],
        ["--base goes with a run; with --model the base is all that is scored"],
    ),
    "glue without a head": (
        ["--model", "builtin:world-llama", "--suite", "glue"],
        ["--suite: glue needs a trained classifier: moc eval RUN"],
    ),
    "no such suite": (
        ["--model", "builtin:world-llama", "--suite", "builtins"],
        ["--suite: found 'builtins'; did you mean 'builtin'? allowed: commonsense, builtin"],
    ),
    "task of another suite": (
        ["--model", "builtin:world-llama", "--tasks", "piqa"],
        ["--tasks: builtin has no task 'piqa'; it is one of commonsense's"],
    ),
    "an encoder": (["--model", "{bert}"], ["--model: '{bert}' is not a language model but bert"]),
    "a file in the way": (
        ["{run}", "--output-dir", "{run}/recipe.yaml"],
        ["cannot write to {run}/recipe.yaml: {run}/recipe.yaml is not a folder"],
    ),
    "no rows": (
        ["--model", "builtin:world-llama", "--suite", "commonsense", "--path", "{run}/none"],
        ["data.path: no folder {run}/none"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_told_before_weights_load(
    case: str, trained: Path, tmp_path: Path, monkeypatch, answer
) -> None:
    words, told = WRONG[case]
    make_tiny_model("bert").config.save_pretrained(tmp_path / "bert")
    monkeypatch.setattr(load, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    places = {"run": trained, "bert": tmp_path / "bert"}
    found = answer(*(word.format(**places) for word in words), code=2)
    assert found["error"].splitlines() == [line.format(**places) for line in told]
    assert not (tmp_path / "runs").exists()


def test_a_classifiers_run_refuses_what_is_for_questions(tmp_path: Path, answer) -> None:
    """Before anything but the recipe is read: there are no controls at all."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(
        "model: {model_name_or_path: m}\ndata: {suite: glue, tasks: mrpc}\n"
        "output: {output_dir: run}\n"
    )
    found = answer("run", "--protocol", "rank", "--base", "--tasks", "rte", code=2)
    assert found["error"].splitlines() == [
        "--tasks: the run's classifier was trained on mrpc, not on rte",
        "--protocol rank is for questions; glue is classified",
        "--base: a classifier's base model has no trained head to score it with",
    ]


# Below the command line


def glue_rows(folder: Path, split: str, rows: int) -> None:
    path = folder / "mnli" / f"{split}.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    lines = [
        {"premise": f"a{number}", "hypothesis": "b" * (number % 5 + 1), "label": number % 3}
        for number in range(rows)
    ]
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))


def test_both_parts_of_mnli_are_scored_and_averaged(tmp_path: Path) -> None:
    glue_rows(tmp_path, "validation_matched", 12)
    glue_rows(tmp_path, "validation_mismatched", 7)
    job = EvalJob(
        DataSection(suite="glue", tasks=["mnli"], path=str(tmp_path)),
        ["mnli"],
        ScoringOptions("auto", 64, "classify"),
    )
    model = make_tiny_model("bert", num_labels=3, type_vocab_size=2)
    loaded = loaded_model(model, make_pair_tokenizer())
    tasks = job.read_rows()
    report = session.score_rows(job, loaded, tasks, tmp_path / "out").to_json()
    assert {name: main_score(entry)["n"] for name, entry in report["tasks"].items()} == {
        "mnli": 12,
        "mnli (mismatched)": 7,
    }
    values = [main_score(entry)["value"] for entry in report["tasks"].values()]
    assert report["average"] == sum(values) / 2
    assert not report["limited"]
    text = shown(report, 80)
    assert "mnli (mismatched)" in text
    assert "average of 2" in text


def loaded_model(model: Any, tokenizer: Any) -> LoadedModel:
    return LoadedModel(bare(model), tokenizer, "m", "0" * 64, torch.device("cpu"))


def choices(task: str, count: int) -> list:
    return [make_example(task, f"{task} {n}?", ["x", "y"], n % 2) for n in range(count)]


def test_ctrl_c_keeps_the_tasks_that_are_scored(
    tmp_path: Path, byte_tokenizer, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    job = EvalJob(DataSection(suite="commonsense", tasks=["boolq"]), [], ScoringOptions(4))
    tasks = [TaskRows.draw(name, choices(name, 5), None) for name in ("boolq", "piqa")]
    loaded = loaded_model(make_tiny_model("llama"), byte_tokenizer)
    score = Choice.score

    def stopped(kind, model, examples, *more):
        if examples[0].task == "piqa":
            raise KeyboardInterrupt
        return score(kind, model, examples, *more)

    monkeypatch.setattr(Choice, "score", stopped)
    with pytest.raises(KeyboardInterrupt):
        session.score_rows(job, loaded, tasks, tmp_path)
    assert "stopped; 1 scored tasks are in" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        session.score_rows(job, loaded, tasks[1:], tmp_path / "none")
    assert "stopped; no task was scored, nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    monkeypatch.setattr(Choice, "score", score)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert list(kept["tasks"]) == ["boolq"]
    report = session.score_rows(job, loaded, tasks[1:], tmp_path)
    assert list(report.tasks) == ["boolq", "piqa"]
    assert report.tasks["boolq"] == kept["tasks"]["boolq"]
    lines = samples(tmp_path)
    assert [line["task"] for line in lines] == ["boolq"] * 5 + ["piqa"] * 5
    assert lines[0]["prompt"] == prompt_hash(tasks[0].examples[0].eval_prompt)


def test_a_folder_with_other_conditions_begins_again(tmp_path: Path) -> None:
    conditions = {"limit": None, "run": "r", "protocol": "rank"}
    ResultsFolder(tmp_path, conditions).add("boolq", ENTRY, [SAMPLE])
    assert ResultsFolder(tmp_path, conditions).tasks == {"boolq": ENTRY}
    other = ResultsFolder(tmp_path, conditions | {"limit": 5})
    assert (other.tasks, other.replaced) == ({}, ["limit"])
    (tmp_path / "samples.jsonl").write_text('{"task": "boolq", "row": 1}\n')
    damaged = ResultsFolder(tmp_path, conditions)
    assert (damaged.tasks, damaged.replaced) == ({}, ["samples.jsonl"])


def test_two_calls_into_one_folder_keep_the_scores_of_both(tmp_path: Path) -> None:
    conditions = {"limit": None, "run": "r", "protocol": "rank"}
    first, second = ResultsFolder(tmp_path, conditions), ResultsFolder(tmp_path, conditions)
    first.add("boolq", ENTRY, [SAMPLE | {"output": "a\u2028b\u0085c"}])
    second.add("piqa", ENTRY, [SAMPLE])
    first.add("arc", ENTRY, [SAMPLE])
    saved = ResultsFolder(tmp_path, conditions)
    assert list(saved.tasks) == ["boolq", "piqa", "arc"]
    assert [line["task"] for line in samples(tmp_path)] == list(saved.tasks)
    other = ResultsFolder(tmp_path, conditions | {"limit": 5})
    other.add("boolq", ENTRY, [SAMPLE])
    with refused(FileError):
        first.add("siqa", ENTRY, [SAMPLE])
    assert ResultsFolder(tmp_path, conditions | {"limit": 5}).tasks == {"boolq": ENTRY}


def test_scores_replace_nothing_but_scores(tmp_path: Path) -> None:
    """Neither a run, nor the results of another program."""
    check_results_folder(tmp_path / "new")
    foreign = {
        "recipe.yaml": "seed: 1",
        "results.json": '{"accuracy": 0.5}',
        "samples.jsonl": '{"id": 1}\n',
    }
    for name, text in foreign.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        with refused(MocError):
            check_results_folder(folder)
    scores = tmp_path / "scores"
    ResultsFolder(scores, {"protocol": "rank"}).add("boolq", ENTRY, [SAMPLE])
    check_results_folder(scores)
    (scores / "results.json").unlink()  # stopped between the two files
    check_results_folder(scores)


def test_a_known_base_is_of_these_rows_and_metrics() -> None:
    task = TaskRows.draw("boolq", choices("boolq", 4), None)
    found = SimpleNamespace(metrics={"accuracy": None})
    first = BaseScore("boolq", task.fingerprint, {"accuracy": 0.25}, "first")
    second = BaseScore("boolq", task.fingerprint, {"accuracy": 0.75}, "second")
    other_rows = BaseScore("boolq", "0" * 64, {"accuracy": 1.0}, "other")
    other_metric = BaseScore("boolq", task.fingerprint, {"f1": 1.0}, "other")
    assert find_score([other_rows, other_metric, first, second], task, found) is first
    assert find_score([other_rows, other_metric], task, found) is None
    assert find_score([first], TaskRows.draw("boolq", choices("boolq", 3), None), found) is None
    assert find_score([first], TaskRows.draw("piqa", choices("boolq", 4), None), found) is None


# The table


def table_entry(value: float, **more: Any) -> dict[str, Any]:
    score = {"value": value, "stderr": 0.0149, "majority": 0.4987, "n": 500, "base": 0.2512}
    entry = {"metric": "accuracy", "metrics": {"accuracy": score}, "base_source": "before training"}
    entry |= {"seconds": 1234.5, "rows": 10042, "limited": True, "batch_size": 32, "halved": 0}
    return entry | more


def shown(results: dict[str, Any], width: int) -> str:
    console = Console(width=width, color_system=None, highlight=False)
    with console.capture() as capture:
        console.print(evaluation_table(results))
    return capture.get()


def table_results(**more: Any) -> dict[str, Any]:
    names = ("boolq", "social_i_qa", "ARC-Challenge", "hellaswag")
    tasks = {name: table_entry(0.5 + n / 7, **more) for n, name in enumerate(names)}
    mean = sum(main_score(entry)["value"] for entry in tasks.values()) / 4
    told = {"protocol": "rank", "dtype": "float32", "device": "cpu", "train_on_inputs": True}
    return told | {"tasks": tasks, "average": mean, "average_of_base": 0.2512, "limited": True}


@pytest.mark.parametrize("more", [{}, {"unparsed": 1234}])
def test_numbers_never_wrap_in_80_columns(more: dict[str, int]) -> None:
    text = shown(table_results(**more), 80)
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if line.startswith("ARC-Challenge"))
    numbers = ["78.6", "1.5", "25.1", "49.9", "500 of 10,042", "1,234"]
    assert [number for number in numbers if number not in row] == []
    assert row.count("1,234") == len(more) + 1
    assert "Scores: accuracy, in %" in text
    average = next(line for line in text.splitlines() if line.startswith("average of 4"))
    assert average.split() == ["average", "of", "4", "71.4", "25.1", "limited"]
    assert ("unparsed" in text) == bool(more)


def test_what_is_not_known_has_no_column_and_what_was_halved_is_told() -> None:
    results = table_results(halved=1, batch_size=8)
    for entry in results["tasks"].values():
        del entry["base_source"]
    text = shown(results | {"average_of_base": None, "limited": False}, 80)
    assert "base" not in text
    assert "halved: boolq, social_i_qa" in " ".join(text.split())
    assert "batches of 8" in text
