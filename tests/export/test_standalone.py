"""The standalone folder where moc does not exist: a clean process, offline, its memory poisoned."""

import ast
import json
import math
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.messages import refused
from support.models import (
    DECODERS,
    FAMILIES,
    WIDTH,
    make_batch,
    make_byte_tokenizer,
    make_pair_tokenizer,
    make_tiny,
    train_controls,
)
from support.processes import run_program
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from moc_cli.errors import MocError
from moc_cli.export import standalone
from moc_cli.methods import Adapted, attach
from moc_cli.recipe.methods import ControlMethod, MocMethod
from moc_cli.recipe.tasks import CLASSIFIER, LANGUAGE

NEW, BEAMS = 6, 4
TOLERANCE = 1e-5  # of the largest logit, in float32
GATE = {"projection_dim": 8}
VARIANTS: dict[str, dict[str, Any]] = {
    "control": {"name": "control"},
    "linear": {"gate": {"kind": "linear"}, "top_k": 3, "scale": 0.7},
    "unshared": {"share_gate": False, "top_k": 2},
    "attn": {"sites": "attn"},
    "ffn_mode": {"sites": "ffn", "routing": {"vote": "mode"}, "top_k": 2},
    "away": {"routing": {"exclude_local": True}, "gate": GATE | {"estimator": "probability"}},
    "running": {"routing": {"decode": "running", "vote": "mode"}, "top_k": 2},
    "token": {"routing": {"level": "token"}, "top_k": 2},
}

# No moc, no network, and memory that was never written to holds what no model survives.
FRESH = """
import json, socket, sys
from pathlib import Path
sys.modules["moc_cli"] = None
try:
    import moc_cli
    raise SystemExit("moc_cli can be imported")
except ImportError:
    pass
def refuse(*args, **kwargs):
    raise OSError("the network is off")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import torch
torch.set_num_threads(1)
def poisoned(make):
    def call(*args, **kwargs):
        made = make(*args, **kwargs)
        if made.device.type == "meta":
            return made
        return made.fill_(float("nan") if made.is_floating_point() else 1 << 20)
    return call
torch.empty, torch.empty_like = poisoned(torch.empty), poisoned(torch.empty_like)
assert torch.empty_like(torch.ones(2)).isnan().all()
import shutil, traceback
import transformers
from transformers import dynamic_module_utils
from safetensors.torch import load_file, save_file
imports_of, known = dynamic_module_utils.get_imports, {}
def once(path):  # transformers parses the same text six times, which takes half of all
    text = Path(path).read_text()
    if text not in known:
        known[text] = imports_of(path)
    return known[text]
dynamic_module_utils.get_imports = once
dynamic_module_utils.HF_MODULES_CACHE = str(Path(sys.argv[1], "modules"))
def answer(place, folder, beams):
    auto = getattr(transformers, (folder / "auto").read_text())
    (folder / "auto").unlink()
    given = load_file(place / f"{folder.stem}.given")
    for turn in ("loaded", "saved again"):
        model = auto.from_pretrained(folder, trust_remote_code=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        with torch.no_grad():
            found = {"logits": model(**given).logits.float().contiguous()}
            if turn == "saved again" and model.can_generate():
                found["ids"] = model.generate(**given, **beams).contiguous()
        words = tokenizer(["tale", "a small tale"], padding=True)["input_ids"]
        found["words"] = torch.tensor(words)
        save_file(found, place / f"{folder.stem}.{turn}")
        again = folder.with_suffix(".again" if turn == "loaded" else ".kept")
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
        shutil.rmtree(folder)
        folder = again
place = Path(sys.argv[1])
for folder in sorted(place.glob("*.moc")):
    try:
        answer(place, folder, json.loads(sys.argv[2]))
    except Exception:
        (place / f"{folder.stem}.error").write_text(traceback.format_exc())
"""


def make(family: str, method: dict[str, Any], dtype: torch.dtype = torch.float32) -> Adapted:
    """A tiny model with sharp gates; a classifier's head is trained, as after a GLUE run.

    Four layers where two give fewer than three routes.
    """
    layers = {"num_hidden_layers": 4} if method or family == "roberta" else {}
    model = make_tiny(family, dtype=dtype, **layers)
    section = ControlMethod if method.get("name") == "control" else MocMethod
    fields = {"rank": 4} | method
    if section is MocMethod:
        fields = {"alpha": 0.6, "gate": GATE} | fields
    parts = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
    heads = () if family in DECODERS else tuple(n for n in parts if n != model.base_model_prefix)
    adapted = attach(model, section.model_validate(fields), new_modules=heads, seed=1)
    train_controls(adapted.named_trainables())
    model.train(False)
    return adapted


def write(adapted: Adapted, folder: Path, causal: bool = True) -> None:
    folder.mkdir()
    tokenizer = make_byte_tokenizer() if causal else make_pair_tokenizer()
    head = LANGUAGE if causal else CLASSIFIER
    standalone.write(adapted.model, tokenizer, adapted.adapter_config(), head, folder)


@dataclass(frozen=True)
class Case:
    """A source model's answers on padded rows, and the largest number of routes at one site."""

    given: dict[str, Tensor]
    logits: Tensor
    ids: Tensor | None
    routes: int


def padded(side: str, rows: int = 8) -> dict[str, Tensor]:
    """Rows of 9 to 1 tokens; padding is a word, for an embedding of 0 would vote for nothing."""
    given = make_batch(rows, side)
    return given | {"input_ids": given["input_ids"].masked_fill(given["attention_mask"] == 0, 7)}


def answers(adapted: Adapted, causal: bool) -> Case:
    given = padded("left" if causal else "right")
    with torch.no_grad():
        logits = adapted.model(**given).logits.float()
        routes = max((len(ids.unique(dim=0)) for ids in adapted.routes().values()), default=0)
        ids = adapted.model.generate(**given, **beams()) if causal else None
    return Case(given, logits, ids, routes)


def beams() -> dict[str, int]:
    return {"num_beams": BEAMS, "min_new_tokens": NEW, "max_new_tokens": NEW}


NAMES = [*FAMILIES, *VARIANTS, "bf16", "bf16_head"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Case]]:
    """Every family and variant written, its answers kept, and all of them read by one process."""
    torch.set_num_threads(1)
    root, cases = tmp_path_factory.mktemp("standalone"), {}
    for name in NAMES:
        family = {"bf16": "llama", "bf16_head": "roberta"}.get(name, name)
        family = "llama" if name in VARIANTS else family
        causal = family in DECODERS
        dtype = torch.bfloat16 if name.startswith("bf16") else torch.float32
        adapted = make(family, VARIANTS.get(name, {}), dtype)
        cases[name] = answers(adapted, causal)
        write(adapted, root / f"{name}.moc", causal)
        auto = "AutoModelForCausalLM" if causal else "AutoModelForSequenceClassification"
        (root / f"{name}.moc" / "auto").write_text(auto)
        save_file(cases[name].given, root / f"{name}.given")
    done = run_program(FRESH, str(root), json.dumps(beams()))
    assert done.returncode == 0, done.stderr[-3000:]
    return root, cases


@pytest.mark.parametrize("turn", ["loaded", "saved again"])
@pytest.mark.parametrize("name", NAMES)
def test_without_moc_it_answers_as_the_run_did(
    name: str, turn: str, place: tuple[Path, dict[str, Case]]
) -> None:
    root, cases = place
    error = root / f"{name}.error"
    assert not error.exists(), error.read_text()
    case, found = cases[name], load_file(root / f"{name}.{turn}")
    if name not in ("control", "bf16", "bf16_head"):
        assert case.routes >= 3
    counted = case.given["attention_mask"].bool() if case.logits.ndim == 3 else slice(None)
    ours, theirs = case.logits[counted], found["logits"][counted]
    largest = ours.abs().max()
    assert torch.isfinite(theirs).all()
    tolerance = 0.05 if name.startswith("bf16") else TOLERANCE
    assert (ours - theirs).abs().max() / largest < tolerance
    if case.ids is not None and turn == "saved again" and name != "bf16":
        assert torch.equal(found["ids"], case.ids)
        assert found["ids"].shape[1] == case.given["input_ids"].shape[1] + NEW
    causal = case.ids is not None
    tokenizer = make_byte_tokenizer() if causal else make_pair_tokenizer()
    texts, side = ["tale", "a small tale"], "left" if causal else "right"
    expected = tokenizer(texts, padding=True, padding_side=side)["input_ids"]
    assert found["words"].tolist() == expected


@pytest.fixture(scope="module", params=["frozen", "running"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """A source and its standalone twin in this process."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("twin")
    adapted = make("llama", {"routing": {"decode": request.param}, "top_k": 2})
    adapted.model.generation_config.eos_token_id = None
    write(adapted, root / "twin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(root / "modules"))
        patch.setattr(sys, "path", [*sys.path, str(root / "modules")])
        twin = AutoModelForCausalLM.from_pretrained(root / "twin", trust_remote_code=True)
    return adapted.model, twin


class TestAsTheSource:
    """Whatever a user does with a cache; both models go through the same calls."""

    def check(self, both: tuple[Any, Any], call: Callable[[Any], Tensor]) -> None:
        with torch.no_grad():
            ours, theirs = (call(model) for model in both)
        assert (ours - theirs).abs().max() <= TOLERANCE * ours.abs().max()

    def test_a_prompt_in_chunks_whose_first_is_padding_for_some_rows(
        self, both: tuple[Any, Any]
    ) -> None:
        given = padded("left")

        def call(model: Any) -> Tensor:
            cache, parts = DynamicCache(config=model.config), []
            for start in range(0, 9, 3):
                out = model(
                    input_ids=given["input_ids"][:, start : start + 3],
                    attention_mask=given["attention_mask"][:, : start + 3],
                    past_key_values=cache,
                )
                parts.append(out.logits[given["attention_mask"][:, start : start + 3].bool()])
            return torch.cat(parts)

        self.check(both, call)

    @pytest.mark.parametrize(
        "options",
        [
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"num_return_sequences": 3, "num_beams": 3},
        ],
        ids=["no_cache", "static", "beams"],
    )
    def test_generations_of_every_kind(
        self, both: tuple[Any, Any], options: dict[str, Any]
    ) -> None:
        given = padded("left")
        with torch.no_grad():
            ours, theirs = (
                model.generate(**given, **options, max_new_tokens=8, do_sample=False)
                for model in both
            )
        assert torch.equal(ours, theirs)

    def test_guessed_tokens(self, both: tuple[Any, Any], request: pytest.FixtureRequest) -> None:
        """Where their votes count, both refuse those that the cache takes back."""
        given = {name: value[:1] for name, value in padded("left").items()}
        options = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 8, "do_sample": False}
        if "running" in request.node.callspec.id:
            for model in both:
                with torch.no_grad(), pytest.raises(RuntimeError, match="taken back have voted"):
                    model.generate(**given, **options)
            return
        with torch.no_grad():
            ours, theirs = (model.generate(**given, **options) for model in both)
        assert torch.equal(ours, theirs)

    def test_a_copied_cache_keeps_its_rows_routes(self, both: tuple[Any, Any]) -> None:
        given = padded("left", 4)
        more = torch.randint(5, 250, (3, 2), generator=torch.Generator().manual_seed(4))

        def call(model: Any) -> Tensor:
            cache = model(**given, use_cache=True).past_key_values
            other = deepcopy(cache)
            cache.batch_select_indices(torch.tensor([0, 0, 1]))
            other.batch_select_indices(torch.tensor([3, 1, 2]))
            mask = torch.cat([given["attention_mask"][[3, 1, 2]], torch.ones_like(more)], dim=1)
            return model(input_ids=more, attention_mask=mask, past_key_values=other).logits

        self.check(both, call)

    def test_a_copied_model_keeps_its_own_controls(self, both: tuple[Any, Any]) -> None:
        given, (_, twin) = padded("left"), both
        copy = deepcopy(twin)
        with torch.no_grad():
            before = twin(**given).logits
            for name, parameter in copy.named_parameters():
                if name.endswith(".B"):
                    parameter.zero_()
            bare, after = copy(**given).logits, twin(**given).logits
        assert torch.equal(before, after)
        assert not torch.allclose(bare, after)

    def test_checkpointed_activations_change_no_gradient(self, both: tuple[Any, Any]) -> None:
        given, twin = padded("left"), deepcopy(both[1]).train()
        found = []
        for enable in (lambda: None, twin.gradient_checkpointing_enable):
            enable()
            twin.zero_grad()
            twin(**given, labels=given["input_ids"]).loss.backward()
            found.append({n: p.grad.clone() for n, p in twin.named_parameters() if "moc." in n})
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        assert found[0]["moc.controls.1.ffn.A"].any()


class TestFolder:
    def test_nobody_loads_the_base_alone_unawares(self, tmp_path: Path) -> None:
        write(make("llama", {}), tmp_path / "folder")
        config = json.loads((tmp_path / "folder" / "config.json").read_text())
        assert config["model_type"] == "moc_llama"
        with pytest.raises(ValueError, match="trust_remote_code"):
            AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=False)

    def test_the_file_imports_torch_and_transformers_alone(self) -> None:
        source = standalone.modeling("LlamaForCausalLM", "LlamaConfig", "moc_llama", LANGUAGE)
        tree = list(ast.walk(ast.parse(source)))
        names = {node.module for node in tree if isinstance(node, ast.ImportFrom)}
        names |= {a.name for node in tree if isinstance(node, ast.Import) for a in node.names}
        outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
        assert outside == {"torch", "transformers"}

    @pytest.mark.parametrize(("base", "inner"), [("Bert", None), ("Llama", "LlamaModel")])
    def test_the_file_reads_as_the_package_does(
        self, base: str, inner: str | None, tmp_path: Path
    ) -> None:
        names = f"{base}ForSequenceClassification", f"{base}Config", f"moc_{base.lower()}"
        source = standalone.modeling(*names, CLASSIFIER, inner)
        assert source == standalone.modeling(*names, CLASSIFIER, inner)
        assert "FAMILIES" not in source, "what the model does not use is left out"
        (tmp_path / "modeling_moc.py").write_text(source)
        for check in (["check", "--select", "E,F"], ["format", "--check"]):
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "ruff",
                    *check,
                    "--isolated",
                    "--line-length",
                    "100",
                    str(tmp_path),
                ],
                check=True,
            )

    @pytest.mark.parametrize(("key", "value"), [("vote", "loud"), ("gate", "round")])
    def test_a_kind_that_the_file_does_not_know_is_refused(
        self, key: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(make("llama", {}), tmp_path / "folder")
        path = tmp_path / "folder" / "config.json"
        config = json.loads(path.read_text())
        config["moc"]["routing"][key] = value
        path.write_text(json.dumps(config))
        modules = str(tmp_path / "modules")
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        monkeypatch.setattr(sys, "path", [*sys.path, modules])
        with refused(ValueError):
            AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)

    def test_a_control_that_the_weights_lack_is_drawn_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(make("llama", {}), tmp_path / "folder")
        path = tmp_path / "folder" / "model.safetensors"
        state = load_file(path)
        lost = [key for key in state if key.startswith(("moc.controls.1.ffn", "moc.gates"))]
        save_file({k: v for k, v in state.items() if k not in lost}, path, {"format": "pt"})
        modules = str(tmp_path / "modules")
        monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        monkeypatch.setattr(sys, "path", [*sys.path, modules])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
        assert len(lost) == 5
        found = dict(model.named_parameters())
        assert not found["moc.controls.1.ffn.B"].any()
        bound = WIDTH**-0.5  # of kaiming-uniform with a = √5
        assert 0.8 * bound < found["moc.controls.1.ffn.A"].abs().max() <= bound
        assert found["moc.gates.shared.log_temperature"].item() == pytest.approx(math.log(2))

    def test_gates_and_heads_stay_in_float32(self, place: tuple[Path, dict[str, Case]]) -> None:
        root, _ = place
        types = {"bf16": set(), "bf16_head": set()}
        for name, found in types.items():
            with safe_open(root / f"{name}.kept" / "model.safetensors", "pt") as file:
                for key in file.keys():  # noqa: SIM118
                    exact = key.startswith(("moc.", "classifier."))
                    found.add((exact, file.get_slice(key).get_dtype()))
        assert types["bf16"] == types["bf16_head"] == {(True, "F32"), (False, "BF16")}

    def test_a_base_of_custom_code_is_refused(self, tmp_path: Path) -> None:
        adapted = make("llama", {})
        adapted.model.__class__ = type("OwnForCausalLM", (type(adapted.model),), {})
        with refused(MocError):
            write(adapted, tmp_path / "folder")
