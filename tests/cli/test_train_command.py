"""`moc train` from the command line to the run folder, on tiny models, in this process."""

import json
import math
import shlex
import shutil

import pytest
import torch
from safetensors.torch import load
from support.models import make_tiny_model
from support.rows import choice_rows, write_rows

from moc_cli.adapter.folder import read_adapter
from moc_cli.cli import run
from moc_cli.results import main_score
from moc_cli.runs import RunFolder


def results(tmp_path) -> dict:
    return RunFolder.open(tmp_path / "run").read_results()


def test_a_run_leaves_its_folder_and_shows_its_tables(tmp_path, choices, capsys):
    assert run(choices) == 0
    shown = capsys.readouterr()
    tables = ("Parameters", "Memory", "Controls of the shared pool", "Scores: accuracy")
    places = [shown.out.index(title) for title in tables]
    assert places == sorted(places)  # the scores last, where the eye rests
    home = tmp_path / "run"
    commands = shown.err.partition("Try next:\n")[2].splitlines()
    assert [line.split("   # ")[0].strip() for line in commands] == [
        f"moc eval {home}",
        f"moc generate {home} --prompt Hello",
        f"moc inspect-routing {home}",
        f"moc export {home} --to controls --output-dir {home}-controls",
        f"moc train {choices[1]} --set method=control --set method.rank=4 "
        f"--output-dir {home}-control",
        f"moc compare {home} {home}-control",
    ]
    folder = RunFolder.open(tmp_path / "run")
    found = folder.read_results()
    task = found["tasks"]["ARC-Easy"]
    assert (found["status"], found["steps"], found["train_on_inputs"]) == ("finished", 6, True)
    assert set(task) == {"metric", "metrics", "seconds"}
    (score,) = task["metrics"].values()
    assert set(score) == {"before", "value", "n", "stderr", "majority"}
    assert (task["metric"], score["n"], score["majority"]) == ("accuracy", 6, 1.0)
    assert found["memory"]["trainable"] == 4 * found["parameters"]["adapter"]
    assert found["memory"]["optimizer"] > 2 * found["memory"]["trainable"]
    assert found["memory"]["peak"] > 10**8
    # Six questions, four sites, and each row decides at each site once.
    assert found["routing"]["pools"]["shared"]["decisions"] == 6 * 4
    adapter = read_adapter(folder.controls)
    config, payload = adapter.config, adapter.payload()
    last = load((folder.checkpoints / "step-000006" / "trainables.safetensors").read_bytes())
    kept = load(payload)
    assert kept.keys() == last.keys()
    assert all(torch.equal(kept[name], last[name]) for name in kept)
    assert (config["step"], config["method"]["name"]) == (6, "moc")
    environment = folder.read_environment()
    assert environment["data"]["train"]["rows"] == 16
    assert environment["model"]["weights_sha256"] == config["base_weights_sha256"]
    losses = [line["loss"] for line in folder.read_metrics()]
    assert losses[-1] < losses[0]
    assert not [path for path in folder.path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def next_commands(arguments, options, folder, capsys):
    """What a short training with these options proposes, each as its words after `moc`."""
    options = [*options, "train.max_steps=1", "eval.before=false", "eval.max_samples=2"]
    changes = [word for option in options for word in ("--set", option)]
    assert run([*arguments, *changes, "--output-dir", str(folder)]) == 0
    lines = capsys.readouterr().err.partition("Try next:\n")[2].splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.usefixtures("same_process", "no_pictures")
def test_every_next_command_runs_as_it_is_printed(tmp_path, choices, capsys):
    """With options of the method set, in a folder with a space."""
    keys = ["rank=2", "alpha=0.8", "top_k=2", "gate.projection_dim=4", "sites=ffn"]
    options = [f"method.{key}" for key in keys]
    commands = next_commands(choices, options, tmp_path / "a run", capsys)
    names = ["eval", "generate", "inspect-routing", "export", "train", "compare"]
    assert [command[0] for command in commands] == names
    for command in commands:
        assert run(command) == 0, command
    other = RunFolder.open(tmp_path / "a run-control").read_recipe(trust_remote_code=False)
    assert (other.method.rank, other.method.sites) == (2, "ffn")
    assert (other.train.max_steps, other.eval.max_samples) == (1, 2)


@pytest.mark.parametrize(
    ("name", "keys"), [("control", ["scale=0.5"]), ("lora", ["alpha=4", "dropout=0"])]
)
def test_the_other_method_is_proposed_at_the_same_rank(name, keys, tmp_path, choices, capsys):
    options = [f"method={name}", "method.rank=2", *(f"method.{key}" for key in keys)]
    commands = next_commands(choices, options, tmp_path / "a run", capsys)
    assert [command[0] for command in commands] == [
        *("eval", "generate", "export", "train", "compare")
    ]
    assert run([*commands[-2], "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    # 4 controls of rank 2 and width 32; a projection to 256, 4 experts, one temperature.
    assert plan["adapter"] == 4 * 2 * 2 * 32 + 256 * (32 + 4) + 1


def test_a_classifier_is_not_asked_to_write(pairs, capsys):
    assert run(pairs) == 0
    assert "moc generate" not in capsys.readouterr().err.partition("Try next:\n")[2]


def test_under_json_stdout_gets_json_alone_and_stderr_the_progress(tmp_path, choices, capsys):
    assert run([*choices, "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == results(tmp_path)
    assert "train 6/6" in shown.err
    assert "after ARC-Easy 6/6" in shown.err


def test_dry_run_touches_nothing_and_shows_the_mask(tmp_path, choices, capsys):
    assert run([*choices, "--dry-run"]) == 0
    plain = capsys.readouterr().out
    assert "⟦" in plain
    masked = [*choices, "--dry-run", "--json", "--set", "data.train_on_inputs=false"]
    assert run(masked) == 0
    found = json.loads(capsys.readouterr().out)
    prompt, answer = found["row"]["pieces"]
    assert (prompt["target"], answer["target"]) == (False, True)
    assert "### Response:" in prompt["text"]
    assert answer["text"].strip().startswith("the correct answer is answer2")
    model = make_tiny_model("llama")
    assert found["base"] == sum(p.numel() for p in model.parameters())
    # 4 controls of rank 4 and width 32; a projection to 8, 4 experts, one temperature.
    assert found["trainable"] == found["adapter"] == 4 * 2 * 4 * 32 + 8 * 32 + 4 * 8 + 1
    assert found["share"] == found["adapter"] / found["base"]
    assert found["steps"] == 6
    assert not (tmp_path / "run").exists()


def test_dry_run_counts_what_a_run_then_trains(tmp_path, pairs, capsys):
    assert run([*pairs, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert run([*pairs, "--json"]) == 0
    parameters = json.loads(capsys.readouterr().out)["parameters"]
    assert planned["row"]["label"] == "not_equivalent"
    assert {name: planned[name] for name in parameters} == parameters
    assert planned["modules"] == 32 * 2 + 2


def test_classification_trains_its_head_and_keeps_the_best_epoch(tmp_path, pairs):
    assert run([*pairs, "--set", "eval.metric_for_best_model=loss"]) == 0
    folder = RunFolder.open(tmp_path / "run")
    found = folder.read_results()
    evaluations = [line for line in folder.read_metrics() if "eval" in line]
    assert [line["step"] for line in evaluations] == [3, 6]
    best = min(evaluations, key=lambda line: line["eval"]["loss"])
    assert found["controls"] == {"step": best["step"], "chosen": "best loss"}
    task = found["tasks"]["mrpc"]
    assert task["metrics"]["accuracy"]["value"] == pytest.approx(best["eval"]["accuracy"])
    assert list(task["metrics"]) == ["accuracy", "f1"]
    payload = read_adapter(folder.controls).payload()
    state = load(payload)
    assert state["modules.classifier.weight"].shape == (2, 32)
    first = make_tiny_model("bert", num_labels=2)
    assert not torch.equal(state["modules.classifier.weight"], first.classifier.weight)


def test_regression_reports_the_correlation(tmp_path, pairs):
    assert run([*pairs, "--set", "data.tasks=[stsb]", "--set", "train.num_train_epochs=8"]) == 0
    task = results(tmp_path)["tasks"]["stsb"]
    assert task["metric"] == "pearson"
    assert main_score(task)["value"] > 0.5
    lines = RunFolder.open(tmp_path / "run").read_metrics()
    evaluations = [line["eval"] for line in lines if "eval" in line]
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]


def test_an_occupied_folder_is_not_touched(tmp_path, choices, capsys):
    assert run(choices) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    capsys.readouterr()
    assert run(choices) == 2
    said = capsys.readouterr().err
    assert "is not empty" in said
    assert f"moc train {choices[1]} --resume auto" in said
    assert f"moc train {choices[1]} --overwrite" in said
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert run([*choices, "--resume", "auto", "--overwrite"]) == 2


def test_a_failed_start_leaves_no_folder_and_spares_the_old_one(tmp_path, choices, capsys):
    broken = ["--set", f"model.model_name_or_path={tmp_path}/nothing"]
    assert run([*choices, *broken]) == 2
    assert not (tmp_path / "run").exists()
    assert run(choices) == 0
    assert run([*choices, *broken, "--overwrite"]) == 2
    assert results(tmp_path)["status"] == "finished"


def test_resume_of_another_recipe_names_the_keys(tmp_path, choices, capsys):
    assert run(choices) == 0
    capsys.readouterr()
    changes = ["--set", "method.rank=2", "--set", "seed=1", "--set", "data.max_length=300"]
    assert run([*choices, "--resume", "auto", *changes]) == 2
    said = capsys.readouterr().err
    for words in ("method.rank (4 then, 2 now)", "seed (42 then, 1 now)", "data.max_length"):
        assert words in said


def test_resume_on_changed_rows_or_weights_is_refused(tmp_path, choices, capsys):
    assert run(choices) == 0
    write_rows(tmp_path / "data" / "ARC-Easy" / "train.jsonl", choice_rows(21))
    assert run([*choices, "--resume", "auto"]) == 2
    assert "the rows changed" in capsys.readouterr().err
    write_rows(tmp_path / "data" / "ARC-Easy" / "train.jsonl", choice_rows(20))
    make_tiny_model("llama", seed=1).save_pretrained(tmp_path / "model")
    assert run([*choices, "--resume", "auto"]) == 2
    said = capsys.readouterr().err
    assert "the weights of the base model" in said
    assert "model.embed_tokens.weight: other values" in said


def test_more_steps_go_on_and_keep_the_score_before(tmp_path, choices, capsys):
    assert run(choices) == 0
    before = main_score(results(tmp_path)["tasks"]["ARC-Easy"])["before"]
    capsys.readouterr()
    assert run([*choices, "--resume", "auto", "--set", "train.max_steps=8"]) == 0
    said = capsys.readouterr().err
    assert "train.max_steps: 6 -> 8" in said
    assert "before ARC-Easy" not in said
    found = results(tmp_path)
    assert found["steps"] == 8
    assert main_score(found["tasks"]["ARC-Easy"])["before"] == before
    history = RunFolder.open(tmp_path / "run").read_environment()["history"]
    assert [entry["from_step"] for entry in history] == [0, 6]


def test_auto_passes_over_a_damaged_checkpoint_and_a_path_does_not(tmp_path, choices, capsys):
    assert run(choices) == 0
    whole = read_adapter(RunFolder.open(tmp_path / "run").controls).payload()
    newest = tmp_path / "run" / "checkpoints" / "step-000006"
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    capsys.readouterr()
    assert run([*choices, "--resume", str(newest)]) == 2
    assert "step-000006 is damaged" in capsys.readouterr().err
    assert run([*choices, "--resume", "auto"]) == 0
    said = capsys.readouterr().err
    assert "step-000006 is damaged" in said
    assert "step-000004, step 4" in said
    assert "set-aside/step-000006" in said
    assert read_adapter(RunFolder.open(tmp_path / "run").controls).payload() == whole


def test_a_checkpoint_may_be_continued_in_another_folder(tmp_path, choices, capsys):
    watched = [*choices, "--set", "eval.eval_strategy=steps", "--set", "eval.eval_steps=2"]
    longer = [*watched, "--set", "train.max_steps=8"]
    assert run(watched) == 0
    first = RunFolder.open(tmp_path / "run")
    before = {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()}
    assert run([*longer, "--resume", str(tmp_path / "run")]) == 2
    assert "is not a checkpoint" in capsys.readouterr().err
    newest = first.checkpoints / "step-000006"
    other = tmp_path / "other"
    assert run([*longer, "--resume", str(newest), "--output-dir", str(other)]) == 0
    assert RunFolder.open(other).read_results()["steps"] == 8
    assert before == {p: p.read_bytes() for p in first.path.rglob("*") if p.is_file()}
    # At a rate of nothing no later step is better, and the best one's checkpoint lies elsewhere.
    still = ["--set", "train.learning_rate=1.0e-20", "--output-dir", str(tmp_path / "still")]
    assert run([*longer, *still, "--resume", str(newest)]) == 0
    found = RunFolder.open(tmp_path / "still").read_results()
    assert found["controls"] == {"step": 8, "chosen": "last"}
    assert found["validation"] is None


def test_resume_without_a_checkpoint_keeps_controls(tmp_path, choices, capsys):
    home = tmp_path / "run"
    assert run([*choices, "--set", "eval.before=false"]) == 0
    shutil.rmtree(home / "checkpoints")
    kept = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert run([*choices, "--resume", "auto"]) == 2
    error = capsys.readouterr().err
    assert "holds controls, and no checkpoint to go on from" in " ".join(error.split())
    assert f"moc train {choices[1]} --overwrite   # replace them" in error
    assert kept == {path: path.read_bytes() for path in kept}


def test_the_command_that_goes_on_is_forced_too(tmp_path, choices, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    assert run([*choices, "--force"]) == 2
    assert f"moc train {choices[1]} --force --resume auto" in capsys.readouterr().err


def test_resume_without_a_checkpoint_starts_over(tmp_path, choices, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("{}")
    assert run([*choices, "--resume", "auto"]) == 0
    assert "starting from the first step" in capsys.readouterr().err
    assert results(tmp_path)["steps"] == 6


def test_bf16_keeps_the_trained_in_float32(tmp_path, choices):
    assert run([*choices, "--set", "train.bf16=true", "--set", "eval.before=false"]) == 0
    payload = read_adapter(RunFolder.open(tmp_path / "run").controls).payload()
    assert {tensor.dtype for tensor in load(payload).values()} == {torch.float32}
    found = results(tmp_path)
    assert main_score(found["tasks"]["ARC-Easy"])["before"] is None
    base = sum(p.numel() for p in make_tiny_model("llama").parameters())
    assert found["memory"]["weights"] == 2 * base
    assert all(math.isfinite(line["loss"]) for line in RunFolder(tmp_path / "run").read_metrics())


def test_recomputed_activations_train_the_same(tmp_path, choices):
    payloads = []
    for mode in ("none", "full"):
        folder = tmp_path / mode
        change = ["--set", f"train.activation_checkpointing={mode}", "--output-dir", str(folder)]
        assert run([*choices, *change]) == 0
        payloads.append(load(read_adapter(RunFolder.open(folder).controls).payload()))
    for name, value in payloads[0].items():
        torch.testing.assert_close(payloads[1][name], value, rtol=1e-4, atol=1e-6)


def test_a_tracker_that_is_not_installed_is_named_before_the_weights(tmp_path, choices, capsys):
    if __import__("importlib").util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    assert run([*choices, "--set", "output.report_to=[trackio]"]) == 2
    assert "trackio is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
