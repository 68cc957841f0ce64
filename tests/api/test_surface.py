"""Controls in a model of one's own: attach, train by any loop, save, load strictly, detach."""

import copy
import doctest
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.messages import refused
from support.models import make_batch, make_tiny, make_tiny_model, train_controls
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

import moc_cli.api
from moc_cli import attach, load_controls
from moc_cli.adapter.folder import CONFIG, PAYLOAD
from moc_cli.errors import MocError, RecipeError, RunError
from moc_cli.methods import Adapted

GATE = {"projection_dim": 8}
LOW = {"rank": 4, "alpha": 8}
METHODS = {
    "moc": ("moc", {"rank": 4, "gate": GATE}),
    "control": ("control", {"rank": 4}),
    "lora": ("lora", LOW),
    "dora": ("dora", LOW),
    "pissa": ("lora", LOW | {"init": "pissa"}),
    "molex": ("molex", LOW | {"gate": GATE}),
}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**make_batch(side="left")).logits


def moved(controls):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in controls.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return controls


def test_the_examples_run():
    assert doctest.testmod(moc_cli.api).failed == 0


def test_the_package_is_light_until_it_is_used():
    code = "import sys, moc_cli; assert 'attach' in dir(moc_cli); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    with refused(AttributeError):
        moc_cli.atach  # noqa: B018


@pytest.mark.parametrize("method", METHODS)
def test_trained_by_an_own_loop_saved_and_loaded(method, tmp_path):
    name, options = METHODS[method]
    model = make_tiny("llama")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    controls = attach(model, name, **options)
    optimizer = torch.optim.AdamW(controls.parameters(), lr=0.01)
    batch = make_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = []
    for _ in range(6):
        loss = model.train()(**batch, labels=labels).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    trained = logits(model)
    controls.save(tmp_path / "a")
    other = make_tiny("llama")
    again = load_controls(other, tmp_path / "a")
    assert torch.equal(logits(other), trained)
    again.save(tmp_path / "b")
    assert (tmp_path / "a" / PAYLOAD).read_bytes() == (tmp_path / "b" / PAYLOAD).read_bytes()
    controls.detach()
    slack = 1e-4 if method == "pissa" else 0
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all((after[key] - before[key]).abs().max() <= slack for key in before)


def test_disabled_is_the_base_and_detached_leaves_nothing():
    model = make_tiny("llama")
    attributes, base = set(vars(model)), logits(model)
    controls = moved(attach(model, "moc", rank=4, gate=GATE))
    assert not torch.equal(logits(model), base)
    with controls.disabled():
        assert torch.equal(logits(model), base)
    assert not torch.equal(logits(model), base)
    assert controls.detach() is model
    assert torch.equal(logits(model), base)
    assert set(vars(model)) == attributes


@pytest.mark.parametrize("method", ["moc", "lora", "molex"])
def test_detached_once_more_changes_nothing(method):
    model = make_tiny_model("llama")
    first = attach(model, method)
    assert first.detach() is model
    second = moved(attach(model, "control", rank=4))
    expected = logits(model)
    assert first.detach() is model
    assert torch.equal(logits(model), expected)
    assert vars(model)["save_pretrained"] == second._save_pretrained
    second.detach()
    assert second.detach() is model


def test_wrong_options_are_all_told_at_once():
    with refused(RecipeError):
        attach(make_tiny("llama"), "moc", rnak=4, alpha=2)
    with refused(RecipeError):
        attach(make_tiny("llama"), "mocc")
    model = make_tiny("llama")
    attach(model, "control", rank=2)
    with refused(MocError):
        attach(model, "control", rank=2)


@pytest.fixture
def saved(tmp_path) -> Path:
    controls = moved(attach(make_tiny("llama"), "moc", rank=4, gate=GATE))
    controls.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_another_base_is_refused(saved):
    for parameter in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        other = make_tiny("llama")
        with torch.no_grad():
            other.get_parameter(parameter).mul_(1.02)
        with refused(RunError):
            load_controls(other, saved)
        assert not hasattr(other, "moc")
    for other in (make_tiny("llama", seed=1), make_tiny("qwen3"), make_tiny("llama", vocab_size=9)):
        with refused(RunError):
            load_controls(other, saved)


def test_a_base_without_the_trained_head_is_another_base(tmp_path):
    head = {"modules": ("classifier",)}
    attach(make_tiny("bert"), "moc", rank=4, gate=GATE, **head).save(tmp_path / "head")
    with refused(RunError):
        load_controls(make_tiny("llama"), tmp_path / "head")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_in_half_precision_is_known_again(saved, dtype):
    load_controls(make_tiny("llama").to(dtype), saved).detach()
    other = make_tiny("llama")
    with torch.no_grad():
        other.model.norm.weight.add_(0.05)
    with refused(RunError):
        load_controls(other.to(dtype), saved)


def test_format_1_is_known_by_the_hash_of_its_files(saved, tmp_path):
    """As runs of earlier versions wrote it: no fingerprint, no seed, no hash of the config."""
    from moc_cli.models.weight_files import known_hash

    home = tmp_path / "base"
    make_tiny("llama").save_pretrained(home)
    config = json.loads((saved / CONFIG).read_text())
    for name in ("config_sha256", "base_fingerprint", "seed"):
        del config[name]
    config |= {"format": 1, "base_weights_sha256": known_hash(str(home))}
    (saved / CONFIG).write_text(json.dumps(config))
    model = make_tiny("llama")
    with refused(RunError):
        load_controls(model, saved)
    model = type(model).from_pretrained(home)
    load_controls(model, saved).detach()
    config["base_weights_sha256"] = "0" * 64
    (saved / CONFIG).write_text(json.dumps(config))
    with refused(RunError, hash="(?<=sha256 )[0-9a-f]{12}"):
        load_controls(model, saved)


def test_a_classifier_comes_with_its_head_and_goes_with_it(tmp_path):
    model = make_tiny("bert")
    controls = moved(attach(model, "moc", rank=4, gate=GATE, modules=["classifier"]))
    assert controls.counts().modules == 3 * 32 + 3
    trained = logits(model)
    controls.save(tmp_path / "saved")
    other = make_tiny("bert")
    with torch.no_grad():  # a head of its own, as from_pretrained draws it
        other.classifier.weight.normal_()
    head, bare = other.classifier.weight.clone(), logits(other)
    again = load_controls(other, tmp_path / "saved")
    assert torch.equal(logits(other), trained)
    again.detach()
    assert torch.equal(other.classifier.weight, head)
    assert torch.equal(logits(other), bare)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_are_back_in_their_type_however_the_controls_go(dtype, tmp_path, monkeypatch):
    def base() -> PreTrainedModel:
        return make_tiny("bert").to(dtype)

    model, bare = base(), logits(base())
    controls = moved(attach(model, "moc", rank=4, gate=GATE, modules=["classifier"]))
    controls.save(tmp_path / "saved")
    assert {p.dtype for p in controls.parameters()} == {torch.float32}
    model(**make_batch(), labels=torch.zeros(8, dtype=torch.long)).loss.backward()
    assert torch.equal(logits(controls.detach()), bare)
    model(**make_batch(), labels=torch.zeros(8, dtype=torch.long)).loss.backward()
    load_controls(model, tmp_path / "saved").detach()
    assert torch.equal(logits(model), bare)

    def fail(self, state):
        raise MocError("another shape")

    monkeypatch.setattr(Adapted, "load_state", fail)
    with pytest.raises(MocError, match="another shape"):
        load_controls(model, tmp_path / "saved")
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(model), bare)


def test_save_spares_folders_that_hold_other_things(saved):
    controls = attach(make_tiny("llama"), "control", rank=2)
    controls.save(saved)  # an adapter's folder is replaced
    (saved / "thesis.tex").write_text("years")
    with refused(MocError):
        controls.save(saved)


class Rows(Dataset):
    """Sixteen rows of eight tokens with their own labels."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(5, 250, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainer(model: PreTrainedModel, folder: Path, **options) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())


@pytest.mark.parametrize("method", ["moc", "lora"])
def test_the_trainer_writes_small_checkpoints_and_resumes_from_them(method, tmp_path):
    name, options = METHODS[method]
    model = make_tiny_model("llama")
    base = {key: value.clone() for key, value in model.state_dict().items()}
    controls = attach(model, name, **options | ({"dropout": 0.0} if method == "lora" else {}))
    start = logits(model)
    run = trainer(model, tmp_path / "run", eval_strategy="steps", load_best_model_at_end=True)
    run.train()
    assert not torch.equal(logits(model), start)
    whole = logits(model)
    first = tmp_path / "run" / "checkpoint-2"
    with safe_open(first / "model.safetensors", "pt") as opened:
        assert len(opened.keys()) == len(controls.parameters())
    assert not (first / "config.json").exists()
    assert all(torch.equal(v, base[k]) for k, v in model.state_dict().items() if k in base)

    other = make_tiny_model("llama")
    loaded = load_controls(other, first)  # a checkpoint is an adapter's folder
    middle = logits(other)
    loaded.detach()
    assert not torch.equal(middle, whole)

    attach(other, name, **options | ({"dropout": 0.0} if method == "lora" else {}))
    again = trainer(other, tmp_path / "run")
    again.train(resume_from_checkpoint=str(first))
    assert torch.equal(logits(other), whole)


@pytest.mark.parametrize("method", METHODS)
def test_groups_for_an_optimizer_leave_the_gates_without_decay(method):
    name, options = METHODS[method]
    controls = attach(
        make_tiny_model("bert", num_labels=2), name, **options, modules=["classifier"]
    )
    decay = {id(p): g["weight_decay"] for g in controls.parameter_groups(0.1) for p in g["params"]}
    named = controls.named_parameters()
    assert decay.keys() == {id(parameter) for parameter in named.values()}
    for key, parameter in named.items():
        spared = key.startswith("gates.") or parameter.ndim < 2
        assert decay[id(parameter)] == (0.0 if spared else 0.1), key


def test_the_trainer_takes_these_groups(tmp_path):
    model = make_tiny_model("llama")
    controls = attach(model, "moc", rank=4, gate=GATE, balance={"weight": 0.0})
    gates = {n: p.clone() for n, p in controls.named_parameters().items() if n.startswith("gates.")}
    optimizer = torch.optim.AdamW(controls.parameter_groups(0.5), lr=0.1)
    run = trainer(model, tmp_path / "run", weight_decay=0.5)
    run = Trainer(model=model, args=run.args, train_dataset=Rows(), optimizers=(optimizer, None))
    run.train()
    after = controls.named_parameters()
    assert all(torch.equal(after[name], value) for name, value in gates.items())


def test_a_copy_saves_itself(tmp_path):
    controls = moved(attach(make_tiny("llama"), "moc", rank=4, gate=GATE))
    other = copy.deepcopy(controls)
    train_controls(other.named_parameters())
    expected = logits(other.model)
    other.model.save_pretrained(tmp_path / "copy")
    assert not torch.equal(logits(controls.model), expected)
    fresh = make_tiny("llama")
    load_controls(fresh, tmp_path / "copy")
    assert torch.equal(logits(fresh), expected)


@pytest.mark.parametrize("method", ["moc", "control", "molex"])
def test_layers_on_several_devices_are_refused(method: str) -> None:
    """As `device_map="auto"` places them; the meta device stands for a second GPU."""
    model = make_tiny("llama")
    model.model.layers[-1].to("meta")
    with refused(MocError):
        attach(model, method, rank=2)
    assert not hasattr(model, "moc")
