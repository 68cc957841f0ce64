"""`moc inspect-routing` from the command line to its files, on tiny runs, in this process."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from support.machine import ROOT
from support.models import make_byte_tokenizer, make_pair_tokenizer, make_tiny_model
from support.rows import choice_rows, pair_rows, write_rows

from moc_cli.cli import run
from moc_cli.data.suites import load_examples
from moc_cli.inspection.ablation import ablate, local_at, row_losses
from moc_cli.inspection.distances import distances
from moc_cli.inspection.figures import FIGURES
from moc_cli.inspection.statistics import control_norm
from moc_cli.inspection.warnings import find_warnings
from moc_cli.load_run import open_run
from moc_cli.methods import TextModel
from moc_cli.nn.control import Control
from moc_cli.recipe.methods import MocMethod
from moc_cli.scoring.classify import classify, pair_loss
from moc_cli.scoring.rank import rank

RECIPE = """
model: {{model_name_or_path: {folder}/model}}
method: {method}
data: {{suite: {suite}, tasks: [{tasks}], path: {folder}/data, held_out: 4, max_length: 400}}
train: {{max_steps: 6, per_device_train_batch_size: 3, gradient_accumulation_steps: 2,
        learning_rate: 1.0e-1}}
eval: {{before: false}}
output: {{output_dir: {folder}/run, logging_steps: 2}}
launch: {{device: cpu, num_threads: 1}}
"""
MOC = "{name: moc, rank: 4, gate: {projection_dim: 8}}"


def train(folder: Path, *more: str, suite="commonsense", tasks="ARC-Easy, ARC-Challenge") -> Path:
    """A run of six steps with a large rate, so that controls are not zero."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder, method=MOC, suite=suite, tasks=tasks))
    changes = [word for change in more for word in ("--set", change)]
    where = folder / ("run" + "".join(c for c in "-".join(more) if c.isalnum()))
    assert run(["train", str(recipe), *changes, "--output-dir", str(where), "--json"]) == 0
    return where


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("decoder")
    make_tiny_model("llama", num_hidden_layers=3).save_pretrained(folder / "model")
    make_byte_tokenizer().save_pretrained(folder / "model")
    for task, first in (("ARC-Easy", 0), ("ARC-Challenge", 7)):
        rows = choice_rows(first + 20)[first:]
        write_rows(folder / "data" / task / "train.jsonl", rows[:12])
        write_rows(folder / "data" / task / "test.jsonl", rows[12:])
    return train(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("encoder")
    make_tiny_model("bert", num_labels=2).save_pretrained(folder / "model")
    make_pair_tokenizer().save_pretrained(folder / "model")
    for split, count in (("train", 20), ("validation", 9)):
        write_rows(folder / "data" / "mrpc" / f"{split}.jsonl", pair_rows(count, [0, 1]))
    return train(folder, suite="glue", tasks="mrpc")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch, request) -> None:
    """Pictures take seconds and have their own tests; one test here draws them."""
    if "drawn" not in request.fixturenames:
        monkeypatch.setattr("moc_cli.inspection.results.write_figures", lambda routing, folder: [])


@pytest.fixture
def drawn(monkeypatch) -> None:
    """The test that asks for this draws a picture; each takes a second."""
    few = {"routing-map": FIGURES["routing-map"]}
    for module in ("figures", "results"):
        monkeypatch.setattr(f"moc_cli.inspection.{module}.FIGURES", few)


def inspect(capsys, *arguments: object) -> dict:
    """What the command prints under --json."""
    capsys.readouterr()
    assert run(["inspect-routing", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refuse(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert run(["inspect-routing", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.usefixtures("drawn")
def test_the_folder_holds_numbers_and_pictures(decoder, tmp_path, capsys):
    found = inspect(capsys, decoder, "--output-dir", tmp_path / "out")
    assert found.pop("folder") == str(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "routing.json").read_text())
    assert written == found
    for name in ("routing.html", "routing-map.svg", "routing-map.png"):
        assert (tmp_path / "out" / name).stat().st_size > 0


def test_the_numbers_add_up(decoder, tmp_path, capsys):
    found = inspect(capsys, decoder, "--output-dir", tmp_path)
    names = [site["name"] for site in found["sites"]]
    assert names == ["0.attn", "0.ffn", "1.attn", "1.ffn", "2.attn", "2.ffn"]
    assert found["decisions"] == 16
    assert {t: v["decisions"] for t, v in found["tasks"].items()} == {
        "ARC-Easy": 8,
        "ARC-Challenge": 8,
    }
    tables = {k: np.array(found[k]) for k in ("counts", "share", "weight", "probability")}
    assert (tables["counts"].sum(1) == 16).all()
    assert np.allclose(tables["share"], tables["counts"] / 16)
    assert np.allclose(tables["weight"], tables["share"])  # K = 1: each weight is 1
    assert np.allclose(tables["probability"].sum(1), 1)
    parts = [np.array(part["counts"]) for part in found["tasks"].values()]
    assert np.array_equal(sum(parts), tables["counts"])
    summary, local = found["summary"], np.trace(tables["counts"]) / 96
    assert summary["local_share"] == pytest.approx(local)
    assert summary["chance_local"] == pytest.approx(1 / 6)
    across = tables["counts"][0::2, 1::2].sum() / 48
    assert summary["attn_to_ffn"] == pytest.approx(across)
    use = tables["counts"].sum(0) / 96
    assert [c["use"] for c in found["per_control"]] == pytest.approx(list(use))
    entropy = -sum(u * math.log(u) for u in use if u)
    assert summary["effective"] == pytest.approx(math.exp(entropy))
    assert summary["dead"] == [name for name, u in zip(names, use, strict=True) if u == 0]


def test_the_record_is_of_the_votes_that_scoring_takes(decoder, tmp_path, capsys):
    found = inspect(capsys, decoder, "--tasks", "ARC-Easy", "--output-dir", tmp_path)
    opened = open_run(decoder)
    data = opened.recipe.data
    examples = load_examples("commonsense", "ARC-Easy", "test", path=data.path)
    with opened.adapted.recorder() as recorder:
        rank(TextModel(opened.adapted, opened.tokenizer), examples, batch_size=3)
    record = recorder.record()
    assert found["counts"] == record.choices()
    means = [(record.sums.probabilities[s] / record.decisions(s)).tolist() for s in range(6)]
    assert np.allclose(found["probability"], means, atol=1e-6)


def keys_of(value) -> set[str]:
    """The names of all keys within a value of JSON."""
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    return set()


def test_the_reference_names_every_key(decoder, tmp_path, capsys):
    """All keys of routing.json stand in the table of REFERENCE.md, and no others."""
    looks = [
        inspect(capsys, decoder, "--ablate", "--compare", decoder, "--output-dir", tmp_path / "a"),
        inspect(capsys, decoder, "--text", "A cup", "--output-dir", tmp_path / "b"),
    ]
    warning = find_warnings(looks[0], MocMethod(balance={"weight": 0.0}))
    found = keys_of(warning)
    for look in looks:
        tasks = look.pop("tasks") or {}
        del look["method"], look["folder"]
        found |= {"tasks", "method"} | keys_of(look) | keys_of(list(tasks.values()))
    section = (ROOT / "REFERENCE.md").read_text().split("What `routing.json`")[1]
    words = set(re.findall(r"`([a-z_]+)`", section.split("What was not asked for")[0]))
    assert words - {"scored", "sample", "token"} == found


def test_history_is_what_training_logged(decoder, tmp_path, capsys):
    lines = [json.loads(line) for line in (decoder / "metrics.jsonl").read_text().splitlines()]
    found = inspect(capsys, decoder, "--limit", 1, "--output-dir", tmp_path)
    assert [entry["step"] for entry in found["history"]] == [2, 4, 6]
    for entry, line in zip(found["history"], lines, strict=True):
        assert entry["use"] == line["routing"]["use"]
        assert sum(entry["use"]) == pytest.approx(1)
        # Four micro-batches (three where an epoch ends) decide once each, at each of six sites.
        counts = [np.array(entry["use"]) * decisions for decisions in (24, 18)]
        assert any(np.allclose(count, count.round(), atol=1e-9) for count in counts)
        assert 0 <= entry["local_share"] <= 1


def test_tables_and_map_are_shown(decoder, tmp_path, capsys):
    assert run(["inspect-routing", str(decoder), "--output-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Which control each site chooses" in shown
    assert "Distance of the tasks' routes" in shown
    assert "effective controls" in shown


def test_one_text_is_told_token_by_token(decoder, tmp_path, capsys):
    found = inspect(capsys, decoder, "--text", "what is red?", "--output-dir", tmp_path)
    tokens = found["tokens"]
    assert "".join(tokens["tokens"]) == "what is red?"
    assert found["decisions"] == 1
    assert found["tasks"] == {}
    for site in range(6):
        chosen = tokens["choice"][site]
        assert found["counts"][site][chosen[0]] == 1
        probability = np.array(found["probability"][site])
        best, second = np.sort(probability)[::-1][:2]
        assert tokens["margin"][site] == pytest.approx(best - second, abs=1e-6)
        assert len(tokens["votes"][site]) == len(tokens["tokens"])
        assert max(tokens["probability"][site]) >= best - 1e-6
    capsys.readouterr()
    arguments = ["--text", "what is red?", "--site", "1.ffn", "--output-dir", str(tmp_path)]
    assert run(["inspect-routing", str(decoder), *arguments]) == 0
    assert "Votes at 1.ffn: chosen" in capsys.readouterr().out


def test_one_text_leaves_what_was_found_on_rows(decoder, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(decoder, copy)
    assert inspect(capsys, copy, "--limit", 2)["folder"] == str(copy / "routing")
    before = (copy / "routing" / "routing.json").read_bytes()
    assert inspect(capsys, copy, "--text", "abc")["folder"] == str(copy / "routing" / "text")
    assert (copy / "routing" / "routing.json").read_bytes() == before


def test_the_votes_of_a_text_are_the_gates_own(decoder, tmp_path, capsys):
    found = inspect(capsys, decoder, "--text", "abc", "--output-dir", tmp_path)
    opened = open_run(decoder)
    layer = opened.adapted.model.model.layers[1]
    seen = []
    layer.post_attention_layernorm.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    ids = opened.tokenizer("abc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        opened.adapted.model(input_ids=ids)
        p = opened.adapted.mixture.gates["shared"](seen[0])[0].softmax(-1)
    assert found["tokens"]["votes"][3] == p.argmax(-1).tolist()
    assert found["tokens"]["probability"][3] == pytest.approx(p.amax(-1).tolist(), abs=1e-6)


def test_runs_are_compared(decoder, tmp_path, capsys):
    same = inspect(capsys, decoder, "--compare", decoder, "--output-dir", tmp_path)["compare"]
    assert same["distance"] == [0.0] * 6
    other = train(decoder.parent, "seed=3")
    found = inspect(capsys, decoder, "--compare", other, "--output-dir", tmp_path)
    theirs = inspect(capsys, other, "--output-dir", tmp_path)
    difference = np.array(found["share"]) - np.array(theirs["share"])
    assert np.allclose(found["compare"]["difference"], difference)
    expected = [
        jensenshannon(p, q, base=2) for p, q in zip(found["share"], theirs["share"], strict=True)
    ]
    assert found["compare"]["distance"] == pytest.approx(expected, abs=1e-8)
    assert max(expected) > 0


def test_each_recipe_is_read_once(decoder, tmp_path, capsys, recipes_read):
    other = shutil.copytree(decoder, tmp_path / "other")
    inspect(capsys, decoder, "--compare", other, "--output-dir", tmp_path / "out", "--limit", "2")
    assert recipes_read == [decoder / "recipe.yaml", other / "recipe.yaml"]


def test_what_cannot_be_inspected_is_said(decoder, encoder, tmp_path, capsys):
    control = train(decoder.parent, "method=control", "method.rank=4", "train.max_steps=1")
    assert "its controls are all local" in refuse(capsys, control)
    told = refuse(capsys, decoder, "--compare", encoder)
    assert "4 sites (0.attn to 1.ffn), this run 6 sites" in told
    unshared = train(decoder.parent, "method.share_gate=false", "train.max_steps=1")
    assert "pools attn and ffn" in refuse(capsys, decoder, "--compare", unshared)
    assert "did you mean '1.ffn'" in refuse(capsys, decoder, "--text", "a", "--site", "1.fnn")
    assert "give a text too" in refuse(capsys, decoder, "--site", "1.ffn")
    assert "did you mean 'ARC-Easy'" in refuse(capsys, decoder, "--tasks", "arc-easy")
    assert "has no split" in refuse(capsys, decoder, "--split", "validation")
    assert "named twice" in refuse(capsys, decoder, "--tasks", "ARC-Easy,ARC-Easy")
    assert "--text is empty" in refuse(capsys, decoder, "--text", " ")
    assert "--device: found 'tpu'; did you mean" in refuse(capsys, decoder, "--device", "tpu")
    assert "one text" in refuse(capsys, decoder, "--text", "a", "--ablate")
    assert "not a run folder" in refuse(capsys, tmp_path)
    inside = decoder / "recipe.yaml" / "x"
    assert f"{inside.parent} is not a folder" in refuse(capsys, decoder, "--output-dir", inside)
    assert not (decoder / "routing").exists()


def test_a_damaged_history_is_told(decoder, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(decoder, copy)
    for routing in ('{"use": 3}', "{}", "7", '{"use": ["x"], "local_share": 0}'):
        (copy / "metrics.jsonl").write_text(f'{{"step": 1, "routing": {routing}}}\n')
        assert "a line's 'routing' is damaged" in refuse(capsys, copy)
    uses = ('{"use": [1], "local_share": 0}', '{"use": [1, 0], "local_share": 0}')
    lines = [f'{{"step": 1, "routing": {routing}}}\n' for routing in uses]
    (copy / "metrics.jsonl").write_text("".join(lines))
    assert "different numbers of controls" in refuse(capsys, copy)


def test_another_split_is_read(decoder, tmp_path, capsys):
    found = inspect(
        capsys, decoder, "--split", "train", "--tasks", "ARC-Easy", "--output-dir", tmp_path
    )
    assert found["split"] == "train"
    assert found["decisions"] == 12


def test_an_encoder_is_inspected_and_ablated(encoder, tmp_path, capsys):
    found = inspect(capsys, encoder, "--ablate", "--output-dir", tmp_path)
    assert found["decisions"] == 9
    opened = open_run(encoder)
    adapted = opened.adapted
    examples = load_examples("glue", "mrpc", "validation", path=opened.recipe.data.path)

    def loss() -> float:
        return pair_loss(
            classify(TextModel(adapted, opened.tokenizer), examples, batch_size=4, max_length=400)
        )

    before = loss()
    assert [entry["site"] for entry in found["ablation"]] == ["0.attn", "0.ffn", "1.attn", "1.ffn"]
    for index, entry in enumerate(found["ablation"]):
        with local_at(adapted.mixture, index):
            assert entry["loss_change"] == pytest.approx(loss() - before, abs=1e-6)
    assert loss() == before


def test_ablation_compares_the_same_rows(decoder):
    opened = open_run(decoder)
    examples = load_examples("commonsense", "ARC-Easy", "test", path=opened.recipe.data.path)
    known = np.array(row_losses(opened, examples, 4))
    with local_at(opened.adapted.mixture, 2):
        changed = np.array(row_losses(opened, examples, 4))
    entry = ablate(opened, examples, batch_size=3)[2]
    change = changed - known
    assert entry["site"] == "1.attn"
    assert entry["loss_change"] == pytest.approx(change.mean(), abs=1e-6)
    assert entry["stderr"] == pytest.approx(change.std(ddof=1) / math.sqrt(len(change)), abs=1e-6)
    assert np.abs(change).max() > 1e-4  # something was routed elsewhere


def test_all_sites_local_is_alpha_one(decoder):
    opened = open_run(decoder)
    mixture, model = opened.adapted.mixture, opened.adapted.model
    ids = torch.randint(5, 250, (5, 9))
    with torch.no_grad():
        routed = model(input_ids=ids).logits
        mixture.reroute = lambda site, route: replace_ids(route, site.local)
        local = model(input_ids=ids).logits
        mixture.reroute = None
        mixture.routing = replace(mixture.routing, alpha=1.0)
        alone = model(input_ids=ids).logits
    assert torch.allclose(local, alone, atol=1e-4)
    assert not torch.allclose(local, routed, atol=1e-3)


def replace_ids(route, local: int):
    return type(route)(torch.full_like(route.ids, local), route.weights)


def test_distances_are_scipys():
    generator = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 9, 5, generator=generator, dtype=torch.float64).unbind()
    p[0, 1:] = 0
    q[0, 0] = 0  # nothing in common
    p, q = ((side / side.sum(1, keepdim=True)).numpy() for side in (p, q))
    expected = [jensenshannon(a, b, base=2) for a, b in zip(p, q, strict=True)]
    assert distances(p, q).tolist() == pytest.approx(expected)
    assert distances(p, q)[0].item() == pytest.approx(1)
    assert distances(p, p).tolist() == [0.0] * 9


def test_a_controls_norm_is_that_of_its_product():
    control = Control(32, 4)
    torch.nn.init.normal_(control.B)
    dense = torch.linalg.matrix_norm(control.B.double() @ control.A.double()).item()
    assert control_norm(control) == pytest.approx(dense)
