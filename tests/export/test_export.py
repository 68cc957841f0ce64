"""`moc export`: controls and merged, proven in a fresh process; the card; the upload; refusals."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import huggingface_hub
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.messages import refused
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from moc_cli.adapter.folder import CONFIG, PAYLOAD
from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.export import FORMATS, ExportFormat, parity
from moc_cli.export.parity import Written
from moc_cli.load_run import open_run

STEPS = [
    "--set",
    "train.max_steps=6",
    "--set",
    "eval.max_samples=8",
    "--set",
    "train.warmup_steps=0",
]


def train(folder: Path, *changes: str) -> Path:
    options = [part for change in changes for part in ("--set", change)]
    arguments = ["train", "quickstart", "--json", *STEPS, *options, "--output-dir", str(folder)]
    assert run(arguments) == 0
    return folder


@pytest.fixture(scope="module")
def moc(tmp_path_factory) -> Path:
    """A run of a few steps on the built-in model."""
    return train(tmp_path_factory.mktemp("run") / "moc")


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("run") / "lora", "method=lora", "method.rank=4")


def export(capsys, *arguments: object) -> tuple[int, dict]:
    capsys.readouterr()
    code = run(["export", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.usefixtures("clean_process")
def test_controls_are_read_back_to_the_bit(moc, tmp_path, capsys):
    folder = tmp_path / "out"
    code, said = export(capsys, moc, "--to", "controls", "--output-dir", folder)
    assert code == 0
    assert said["parity"]["bit_equal"] is True
    assert said["parity"]["rows"] == 8
    assert said["parity"]["positions"] > 100
    assert said["sizes"] == {path.name: path.stat().st_size for path in folder.iterdir()}
    assert (folder / PAYLOAD).read_bytes() == (moc / "controls" / PAYLOAD).read_bytes()
    config = json.loads((folder / CONFIG).read_text())
    assert (config["format"], config["kind"], config["seed"]) == (2, "causal", 42)


@pytest.mark.usefixtures("same_process")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_halves_the_controls_and_spares_the_gate(dtype, moc, tmp_path, capsys):
    folder = tmp_path / "out"
    code, said = export(capsys, moc, "--to", "controls", "--output-dir", folder, "--dtype", dtype)
    assert code == 0
    assert said["parity"]["bit_equal"] is True
    rounding = said["parity"]["rounding"]
    assert 0 < rounding["relative_difference"] <= rounding["tolerance"]
    narrow, wide = getattr(torch, dtype), torch.float32
    for name, value in load_file(folder / PAYLOAD).items():
        assert value.dtype == (narrow if name.startswith("controls.") else wide)


@pytest.mark.parametrize("change", ["method.init=pissa", "method=dora", "method.init=default"])
def test_merged_needs_no_moc_and_agrees(change, tmp_path, capsys, request):
    fresh = change == "method.init=default"  # one of three is read by a clean process
    request.getfixturevalue("clean_process" if fresh else "same_process")
    changes = [change] if change == "method=dora" else ["method=lora", change]
    source = train(tmp_path / "run", *changes, "method.rank=4")
    folder = tmp_path / "out"
    code, said = export(capsys, source, "--to", "merged", "--output-dir", folder)
    assert code == 0
    assert 0 < said["parity"]["relative_difference"] <= 1e-5
    with safe_open(folder / "model.safetensors", "pt") as opened:
        keys = list(opened.keys())
    assert not [name for name in keys if "lora" in name or "base_layer" in name]
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    model = AutoModelForCausalLM.from_pretrained(folder)
    trained = open_run(source)
    rows = parity.reference(trained)
    with torch.no_grad():
        found = model(**rows.inputs).logits
    assert parity.compare(rows, found)["relative_difference"] <= 1e-5
    with trained.adapted.disabled():
        bare = parity.reference(trained).logits
    assert parity.compare(rows, bare)["relative_difference"] > 1e-3


@pytest.mark.parametrize("method", ["moc", "control", "molex"])
def test_gated_methods_cannot_be_merged_and_are_told_why(method, tmp_path, capsys, monkeypatch):
    (tmp_path / "run").mkdir()
    from moc_cli.recipe.load import dump, load_recipe

    text = dump(load_recipe("quickstart", [f"method={method}"]))
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    monkeypatch.setattr("moc_cli.export.session.open_run", None)  # weights are not even loaded
    code, said = export(
        capsys, tmp_path / "run", "--to", "merged", "--output-dir", tmp_path / "out"
    )
    assert code == 2
    assert "cannot be merged" in said["error"]
    assert "--to standalone" in said["hint"] or method == "molex"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("same_process")
def test_an_export_that_gives_other_logits_is_not_done(moc, tmp_path, capsys, monkeypatch):
    """A payload that is not the run's passes every hash; its logits give it away."""
    from moc_cli.export import controls

    def other(state, dtype):
        return {
            name: value + 0.01 if name.endswith("B") else value for name, value in state.items()
        }

    honest = controls.save
    monkeypatch.setattr(controls, "save", lambda state, meta: honest(other(state, None), meta))
    code, said = export(capsys, moc, "--to", "controls", "--output-dir", tmp_path / "out")
    assert code == 2
    assert "does not give the run's logits" in said["error"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_wrong_is_told_before_weights_load(moc, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moc_cli.export.session.open_run", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years")
    new = tmp_path / "new"
    for arguments, words in (
        ([moc, "--to", "controls", "--output-dir", tmp_path / "full"], "is not empty"),
        (
            [moc, "--to", "controls", "--output-dir", tmp_path / "full" / "thesis.tex"],
            "not a folder",
        ),
        ([moc, "--to", "control", "--output-dir", new], "did you mean 'controls'"),
        ([moc, "--to", "controls", "--output-dir", new, "--dtype", "fp16"], "float16"),
        ([tmp_path, "--to", "controls", "--output-dir", new], "no recipe.yaml"),
        (
            [moc, "--to", "controls", "--output-dir", new, "--push-to-hub", "me/it"],
            "HF_HUB_OFFLINE",
        ),
    ):
        code, said = export(capsys, *arguments)
        assert code == 2
        assert words in said["error"]
    assert not new.exists()


class Hub:
    """Stands in for the hub's client; keeps what it was asked."""

    def __init__(self, calls: list, error: Exception | None = None) -> None:
        self.calls, self.error = calls, error

    def create_repo(self, name, **options):
        self.calls.append(("create", name, options))
        return f"https://hub.invalid/{name}"

    def upload_folder(self, *, repo_id, folder_path, **options):
        if self.error:
            raise self.error
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload", repo_id, str(folder_path), names))


@pytest.mark.usefixtures("same_process")
def test_the_finished_folder_is_uploaded_only_when_asked(moc, tmp_path, capsys, monkeypatch):
    calls: list = []
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Hub(calls))
    assert export(capsys, moc, "--to", "controls", "--output-dir", tmp_path / "a")[0] == 0
    assert calls == []
    asked = ["--output-dir", tmp_path / "b", "--push-to-hub", "me/mine"]
    code, said = export(capsys, moc, "--to", "controls", *asked)
    assert (code, said["url"]) == (0, "https://hub.invalid/me/mine")
    assert calls[0] == ("create", "me/mine", {"private": True, "exist_ok": True})
    files = ["README.md", CONFIG, PAYLOAD]
    assert calls[1] == ("upload", "me/mine", str(tmp_path / "b"), files)


@pytest.mark.usefixtures("same_process")
def test_a_failed_upload_leaves_the_folder_and_says_how_to_go_on(
    moc, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    broken = Hub([], ConnectionError("no route to host"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: broken)
    out = tmp_path / "out"
    asked = ["--output-dir", out, "--push-to-hub", "me/mine"]
    code, said = export(capsys, moc, "--to", "controls", *asked)
    assert code == 2
    assert "no route to host" in said["error"]
    assert f"hf upload me/mine {out}" in said["hint"]
    assert (out / PAYLOAD).exists()


def score_line(task: dict, reference: str) -> str:
    """The line of a card's table for the accuracy of `task`."""
    score = task["metrics"]["accuracy"]
    before, value, error, majority = (
        f"{100 * score[key]:.1f}" for key in (reference, "value", "stderr", "majority")
    )
    return f"| world | accuracy | {before} | {value} ± {error} | {majority} | {score['n']} |\n"


@pytest.mark.usefixtures("same_process")
def test_the_card_says_where_it_comes_from_and_its_example_runs(moc, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "out"
    assert export(capsys, moc, "--to", "controls", "--output-dir", folder)[0] == 0
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "moc"
    assert front["pipeline_tag"] == "text-generation"
    assert "mixture-of-control" in front["tags"]
    assert "base_model" not in front  # the hub knows no builtin:world-llama
    environment = json.loads((moc / "environment.json").read_text())
    results = json.loads((moc / "results.json").read_text())
    assert environment["model"]["weights_sha256"] in text
    assert environment["data"]["train"]["sha256"] in text
    assert score_line(results["tasks"]["world"], "before") in text
    assert "| task | metric | untrained | trained | majority | n |\n" in text
    for words in (
        "protocol `rank`",
        "8 drawn rows a task",
        "step 6 (last)",
        "`train_on_inputs: false`",
    ):
        assert words in text
    assert "never used" in text
    assert "equal to the bit" in text
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    assert hasattr(names["model"], "moc")


def nothing_written() -> tuple[Written, dict]:
    """What a card needs of a format beside the run, with a proof of no positions."""
    empty = torch.zeros(0)
    proof = {"bit_equal": True, "max_difference": 0.0, "positions": 0, "rows": 0}
    return Written("", parity.Reference({}, empty, empty)), proof


@pytest.mark.usefixtures("clean_process")
def test_no_format_is_done_without_a_proof(moc, tmp_path, capsys, monkeypatch):
    """A format that writes nothing loadable, or that has one type, cannot be taken for another."""
    format_ = ModuleType("empty_format")
    format_.export = lambda trained, folder, options: Written(
        "raise ValueError('nothing to load')", parity.reference(trained)
    )
    monkeypatch.setitem(sys.modules, "empty_format", format_)
    monkeypatch.setitem(FORMATS, "empty", ExportFormat("empty_format", "nothing"))
    code, said = export(capsys, moc, "--to", "empty", "--output-dir", tmp_path / "out")
    assert code == 2
    assert "nothing to load" in said["error"]
    options = ["--output-dir", tmp_path / "out", "--dtype", "float16"]
    code, said = export(capsys, moc, "--to", "empty", *options)
    assert code == 2
    assert "--dtype float16" in said["error"]
    assert list(tmp_path.iterdir()) == []


def test_the_card_shows_the_base_beside_what_was_evaluated(moc, tmp_path, capsys):
    from moc_cli.export.card import make_card

    folder = tmp_path / "run"
    shutil.copytree(moc, folder)
    capsys.readouterr()
    assert run(["eval", str(folder), "--limit", "7", "--base", "--json"]) == 0
    task = json.loads(capsys.readouterr().out)["tasks"]["world"]
    card = make_card(open_run(folder), *nothing_written(), "controls", {})
    part = card.split("`moc eval`: protocol `rank`, 7 drawn rows a task.")[1]
    assert score_line(task, "base") in part
    assert "| task | metric | base | trained | majority | n |\n" in part


def test_the_card_names_a_base_of_the_hub(moc):
    from dataclasses import replace

    from moc_cli.export.card import make_card

    trained = open_run(moc)
    model = trained.recipe.model.model_copy(update={"model_name_or_path": "some/model-7b"})
    told = replace(trained, recipe=trained.recipe.model_copy(update={"model": model}))
    card = make_card(told, *nothing_written(), "controls", {})
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "some/model-7b"


def test_a_damaged_or_mismatched_run_is_refused(moc, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(moc, folder)
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace("alpha: 0.95", "alpha: 0.5"))
    code, said = export(capsys, folder, "--to", "controls", "--output-dir", tmp_path / "a")
    assert code == 2
    assert "another method" in said["error"]
    (folder / "recipe.yaml").write_text(text)
    state = load_file(folder / "controls" / PAYLOAD)
    save_file({name: value + 1 for name, value in state.items()}, folder / "controls" / PAYLOAD)
    code, said = export(capsys, folder, "--to", "controls", "--output-dir", tmp_path / "a")
    assert code == 2
    assert "does not match its hash" in said["error"]


def test_every_format_has_its_place():
    assert list(FORMATS) == ["controls", "peft", "standalone", "static", "merged"]


@pytest.mark.usefixtures("clean_process")
def test_a_process_that_fails_is_quoted(tmp_path):
    rows = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    with refused(MocError):
        parity.fresh_logits(tmp_path, "raise ValueError('nothing here')", rows)
    many = (
        "raise ValueError('the first line ' + 'and on ' * 90 + chr(10) + '  of ' + chr(10) + 'two')"
    )
    with refused(MocError) as caught:
        parity.fresh_logits(tmp_path, many, rows)
    assert "ValueError: the first line and on" in str(caught.value)
    with refused(MocError):
        parity.fresh_logits(tmp_path, "raise SystemExit(3)", rows)


def test_a_difference_is_told_beside_what_is_allowed():
    """The type is named only where it decides."""
    figures = {"max_difference": 0.5, "relative_difference": 0.25}
    for dtype, tolerance in (("float32", 0), ("float32", None), ("bfloat16", None)):
        with refused(MocError):
            parity.check_tolerance(figures, dtype, tolerance)


@pytest.mark.parametrize("name", ["smollm2-135m", "minilm"])
def test_real_weights_go_out_and_come_back(name, real_weights, tmp_path, request):
    """Fresh controls, moved from zero, on real weights: saved, and loaded by another program."""
    from moc_cli import attach

    causal = name == "smollm2-135m"
    # one of two is read by a clean process
    request.getfixturevalue("same_process" if causal else "clean_process")
    auto = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
    classes = {"causal": AutoModelForCausalLM, "not": AutoModelForSequenceClassification}
    home = real_weights(name)
    model = classes["causal" if causal else "not"].from_pretrained(home).eval()
    modules = () if causal else ("classifier",)
    controls = attach(model, "moc", rank=4, top_k=2, modules=modules)
    with torch.no_grad():
        for key, parameter in controls.named_parameters().items():
            if key.endswith(".B"):
                parameter.normal_(std=0.02)
    controls.save(tmp_path / "out")
    ids = torch.tensor([[5, 60, 700, 800, 9], [0, 0, 11, 12, 13]])
    rows = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    with torch.no_grad():
        logits = model(**rows).logits
    code = (
        f"from transformers import {auto}\nfrom moc_cli import load_controls\n"
        f"model = {auto}.from_pretrained({str(home)!r})\nload_controls(model, folder)"
    )
    found = parity.fresh_logits(tmp_path / "out", code, rows)
    mask = rows["attention_mask"].bool() if causal else slice(None)
    assert torch.equal(found[mask], logits[mask])
