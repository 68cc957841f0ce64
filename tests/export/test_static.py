"""Frozen routes: the choice, the folded pairs against the mixture so rerouted, the command."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.messages import refused
from support.models import (
    DECODERS,
    make_batch,
    make_byte_tokenizer,
    make_tiny,
    make_tiny_model,
    train_controls,
)
from support.rows import choice_rows, write_rows
from torch import Tensor

from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.export import FormatOptions, check_format, standalone, static
from moc_cli.load_run import open_run
from moc_cli.methods import Adapted, attach
from moc_cli.methods.route_counts import Layout, Record, Sums
from moc_cli.recipe.methods import ControlMethod, DoraMethod, LoraMethod, MocMethod, MolexMethod

TOLERANCE = 2e-6  # of the largest logit, in float32: other sums of the same products
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "several": {"top_k": 3, "scale": 0.7},
    "probability": {"top_k": 2, "gate": {"estimator": "probability", "projection_dim": 8}},
    "unshared": {"share_gate": False},
    "ffn": {"sites": "ffn"},
    "running": {"routing": {"decode": "running"}},
    "token": {"routing": {"level": "token"}},
}


def make(family: str, method: dict[str, Any]) -> Adapted:
    model = make_tiny(family)
    fields = {"rank": 4, "alpha": 0.6, "gate": {"projection_dim": 8}} | method
    heads = () if family in DECODERS else ("classifier",)
    adapted = attach(model, MocMethod.model_validate(fields), new_modules=heads, seed=1)
    train_controls(adapted.named_trainables())
    return adapted


def count(adapted: Adapted, batch: dict[str, Tensor]) -> Record:
    recorder = adapted.recorder()
    with recorder, torch.no_grad():
        adapted.model(**batch)
    return recorder.record()


def freeze(adapted: Adapted, method: dict[str, Any], frozen: dict[int, static.Frozen]) -> Adapted:
    """The folded pairs in a model of their own."""
    section = MocMethod.model_validate({"rank": 4} | method)
    model = make_tiny(adapted.model.config.model_type)
    fresh = attach(
        model,
        static.static_method(section),
        new_modules=tuple(adapted.adapter_config()["modules"]),
        seed=9,
    )
    fresh.load_state(static.fold(adapted, frozen))
    return fresh


class TestFolded:
    @pytest.mark.parametrize("family", ["llama", "granite", "gpt_neox"])
    @pytest.mark.parametrize("name", VARIANTS)
    def test_it_is_the_mixture_with_its_routes_held(self, name: str, family: str) -> None:
        adapted, batch = make(family, VARIANTS[name]), make_batch(side="left")
        frozen = static.choose(adapted.mixture, count(adapted, batch))
        fresh = freeze(adapted, VARIANTS[name], frozen)
        beams = {"num_beams": 3, "min_new_tokens": 8, "max_new_tokens": 8}
        with torch.no_grad():
            free = adapted.model(**batch).logits
            with static.frozen_routes(adapted.mixture, frozen):
                ours, ids = adapted.model(**batch).logits, adapted.model.generate(**batch, **beams)
            theirs = fresh.model(**batch).logits
            assert torch.equal(fresh.model.generate(**batch, **beams), ids)
        mask = batch["attention_mask"].bool()
        largest = ours[mask].abs().max()
        assert (ours - theirs)[mask].abs().max() / largest < TOLERANCE
        assert (ours - free)[mask].abs().max() / largest > 1e-3  # the routes do matter here

    def test_a_trained_head_goes_with_it(self) -> None:
        adapted, batch = make("roberta", {}), make_batch()
        frozen = static.choose(adapted.mixture, count(adapted, batch))
        with torch.no_grad():
            for name, parameter in adapted.named_trainables().items():
                if name.startswith("modules."):
                    parameter.add_(1.0)
            with static.frozen_routes(adapted.mixture, frozen):
                ours = adapted.model(**batch).logits
            theirs = freeze(adapted, {}, frozen).model(**batch).logits
        assert (ours - theirs).abs().max() / ours.abs().max() < TOLERANCE

    def test_its_controls_sit_where_the_runs_do(self) -> None:
        places = {"read": "mlp", "write": "self_attn"}
        placement = {"layers": "layers", "attn": places, "ffn": places, "causal": True}
        method = MocMethod(rank=4, top_k=2, sites="ffn", placement=placement)
        frozen = static.static_method(method)
        assert (frozen.rank, frozen.sites, frozen.placement) == (12, "ffn", method.placement)

    def test_routes_are_free_again_afterwards(self) -> None:
        adapted, batch = make("llama", {}), make_batch(side="left")
        before = count(adapted, batch)
        with static.frozen_routes(adapted.mixture, static.choose(adapted.mixture, before)):
            pass
        after = count(adapted, batch)
        pairs = zip(before.sums.arrays, after.sums.arrays, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def recorded(counts: list[list[float]], weights: list[list[float]], top_k: int) -> Record:
    names = tuple(f"{i // 2}.{'ffn' if i % 2 else 'attn'}" for i in range(4))
    layout = Layout(names, ("shared",) * 4, {"shared": [0, 1, 2, 3]}, top_k)
    sums = Sums.zeros(4, 4)
    sums.counts.copy_(torch.tensor(counts))
    sums.weights.copy_(torch.tensor(weights))
    return Record(layout, sums)


class TestChoice:
    def test_the_most_used_is_taken_then_the_heavier_then_the_first(self) -> None:
        mixture = make("llama", {"top_k": 2}).mixture
        counts = [[1, 5, 0, 4], [3, 3, 2, 2], [0, 0, 5, 5], [2, 2, 3, 3.0]]
        weights = [[0.5, 3, 0, 1], [1, 2, 1, 1], [0, 0, 2, 3], [1, 1, 1, 1.5]]
        frozen = static.choose(mixture, recorded(counts, weights, 2))
        assert [choice.ids for choice in frozen.values()] == [(1, 3), (1, 0), (3, 2), (3, 2)]
        assert frozen[0].weights == pytest.approx((0.6 / 0.85, 0.25 / 0.85))
        assert sum(frozen[2].weights) == pytest.approx(1)

    def test_one_control_has_weight_one_and_a_probability_stays_one(self) -> None:
        counts, weights = [[0, 0, 4, 1.0]] * 4, [[0, 0, 1.0, 0.1]] * 4
        plain = make("llama", {}).mixture
        soft = make("llama", {"gate": {"estimator": "probability", "projection_dim": 8}}).mixture
        assert static.choose(plain, recorded(counts, weights, 1))[0].weights == (1.0,)
        assert static.choose(soft, recorded(counts, weights, 1))[0].weights == (0.25,)

    def test_no_decision_is_an_error(self) -> None:
        nothing = [[0.0] * 4] * 4
        with refused(MocError):
            static.choose(make("llama", {}).mixture, recorded(nothing, nothing, 1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on questions whose second option is right."""
    place = tmp_path_factory.mktemp("run")
    make_tiny_model("llama").save_pretrained(place / "model")
    make_byte_tokenizer().save_pretrained(place / "model")
    write_rows(place / "data" / "ARC-Easy" / "train.jsonl", choice_rows(24))
    write_rows(place / "data" / "ARC-Easy" / "test.jsonl", choice_rows(10))
    recipe = {
        "model": {"model_name_or_path": str(place / "model")},
        "method": {"name": "moc", "rank": 4, "alpha": 0.6, "gate": {"projection_dim": 8}},
        "data": {
            "suite": "commonsense",
            "tasks": ["ARC-Easy"],
            "path": str(place / "data"),
            "held_out": 4,
            "max_length": 400,
        },
        "train": {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.02},
        "eval": {"before": False, "max_samples": 4},
        "output": {"output_dir": str(place / "run"), "save_strategy": "no"},
        "launch": {"device": "cpu", "num_threads": 1},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    assert run(["train", str(place / "recipe.yaml")]) == 0
    return place / "run"


class TestCommand:
    @pytest.mark.usefixtures("clean_process")
    def test_static_reports_agreement_and_both_scores(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        arguments = [
            "export",
            str(trained),
            "--to",
            "static",
            "--output-dir",
            str(tmp_path / "out"),
        ]
        assert run([*arguments, "--calibration", "8", "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        counted, scored = (told["facts"]["agreement"][part] for part in ("calibration", "scored"))
        assert (counted["rows"], scored["rows"]) == (8, 4)
        assert 0 < counted["lowest"]["share"] <= counted["share"] <= 1
        assert 0 <= scored["share"] <= 1
        (score,) = told["facts"]["scores"]
        assert (score["task"], score["metric"], score["n"]) == ("ARC-Easy", "accuracy", 4)
        assert told["parity"]["relative_difference"] <= 1e-5
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["method"]["name"] == "control"
        assert config["method"]["rank"] == 8
        entries = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert {key.rsplit(".", 1)[1]: tuple(value.shape) for key, value in entries.items()} == {
            "A": (8, 32),
            "B": (32, 8),
        }
        assert set(told["facts"]["routes"]) == {"0.attn", "0.ffn", "1.attn", "1.ffn"}

    def test_rows_too_long_for_the_model_are_left_out(
        self, trained: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As where they are trained on and scored: training cuts them, and scoring leaves out."""
        loaded = open_run(trained)
        recipe, splits = static.read_rows(loaded.recipe)
        long = replace(splits.train[0], eval_prompt="word " * 200 + splits.train[0].eval_prompt)
        longer = replace(
            splits,
            train=[long, *splits.train],
            tests={name: [long, *part] for name, part in splits.tests.items()},
        )
        monkeypatch.setattr(static, "read_rows", lambda _: (recipe, longer))
        for part, whole in zip(
            static.drawn_rows(loaded, 64), (splits.train, *splits.tests.values()), strict=True
        ):
            assert part == {"ARC-Easy": whole}
            static.score_tasks(loaded, part, "scoring")

    @pytest.mark.usefixtures("clean_process")
    def test_standalone_is_a_whole_folder(
        self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        capsys.readouterr()
        out = tmp_path / "out"
        arguments = ["export", str(trained), "--to", "standalone", "--output-dir", str(out)]
        assert run([*arguments, "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["parity"]["relative_difference"] <= 1e-5
        assert {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "modeling_moc.py",
            "tokenizer.json",
            "tokenizer_config.json",
        } <= set(told["sizes"])
        card = (out / "README.md").read_text()
        assert "trust_remote_code=True" in card
        assert str(trained.parent) not in (out / "config.json").read_text()


class TestRefused:
    @pytest.mark.parametrize("method", [ControlMethod(), MocMethod(top_k=0), LoraMethod()])
    def test_nothing_to_freeze(self, method: Any) -> None:
        with refused(MocError):
            static.check(recipe(method))

    @pytest.mark.parametrize("method", [LoraMethod(), DoraMethod(), MolexMethod()])
    def test_standalone_holds_controls_alone(self, method: Any) -> None:
        with refused(MocError):
            standalone.check(recipe(method))

    def test_other_types(self) -> None:
        for name in ("static", "standalone", "peft"):
            check_format(name, recipe(MocMethod()), FormatOptions(dtype="float32"))
            with refused(MocError):
                check_format(name, recipe(MocMethod()), FormatOptions(dtype="float16"))


def recipe(method: Any) -> Any:
    return SimpleNamespace(method=method, train=SimpleNamespace(bf16=False))
