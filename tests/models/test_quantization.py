"""Bases whose linear weights bitsandbytes keeps in 4 or 8 bits, on a CPU."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from support.combinations import half_of_product
from support.messages import refused, warned
from support.models import DECODERS, FAMILIES, make_tiny_model
from torch import nn

from moc_cli import api
from moc_cli.errors import MocError
from moc_cli.methods import attach
from moc_cli.models.load import Loaded, build_meta, load_model
from moc_cli.models.quantization import (
    count_numbers,
    is_quantized,
    keep_differentiable,
    of_model,
    parts,
)
from moc_cli.recipe.methods import (
    ControlMethod,
    DoraMethod,
    LoraMethod,
    MethodConfig,
    MocMethod,
    MolexMethod,
)
from moc_cli.recipe.quantization import Quantization, of_arguments

NF4 = Quantization(load_in_4bit=True)
INT8 = Quantization(load_in_8bit=True)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
GATE = {"projection_dim": 8}
METHODS = (
    ControlMethod(rank=4),
    MocMethod(rank=4, gate=GATE),
    LoraMethod(rank=4),
    DoraMethod(rank=4),
    MolexMethod(rank=4, gate=GATE),
)


def load(folder: Path, quantization: Quantization | None = None, **options) -> Loaded:
    return load_model(str(folder), kind="causal", quantization=quantization, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory, llama) -> Path:
    """The same model in a folder that holds it in 4 bits."""
    folder = tmp_path_factory.mktemp("packed")
    load(llama, NF4).model.save_pretrained(folder)
    return folder


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the trained parameters, in training mode; each B is set to 0.1 before."""
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if name.endswith(".B"):
            nn.init.constant_(parameter.data, 0.1)
    model.train()(IDS, labels=IDS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"deberta"}))
def test_every_family_is_known_again_in_4_bits(tmp_path, family) -> None:
    causal = family in DECODERS
    kind, labels = ("causal", {}) if causal else ("classification", {"num_labels": 2})
    make_tiny_model(family, **labels).save_pretrained(tmp_path)
    whole = load_model(str(tmp_path), kind=kind, **labels)
    small = load_model(str(tmp_path), kind=kind, quantization=NF4, **labels)
    assert of_model(small.model) == small.quantization == NF4
    common = small.fingerprint.keys() & whole.fingerprint.keys()
    assert common >= {"unquantized_bfloat16", "unquantized_float16"}
    assert all(small.fingerprint[key] == whole.fingerprint[key] for key in common)
    if family != "gemma3":  # whose weights have other names in its files
        assert (small.weights_hash, small.fingerprint) == (whole.weights_hash, whole.fingerprint)
    size = sum(parameter.numel() for parameter in whole.model.parameters())
    assert sum(map(count_numbers, small.model.parameters())) == size
    before = logits(small.model)
    adapted = attach(small.model, ControlMethod(rank=4))
    assert torch.equal(logits(small.model), before)
    assert adapted.counts().base == size
    loss = small.model.train()(IDS).logits.logsumexp(-1).sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(adapted))


def trained(adapted) -> list[nn.Parameter]:
    return list(adapted.named_trainables().values())


def test_a_family_that_cannot_is_refused_by_name(tmp_path) -> None:
    make_tiny_model("deberta", num_labels=2).save_pretrained(tmp_path)
    for make in (build_meta, load_model):
        with refused(MocError):
            make(str(tmp_path), kind="classification", quantization=NF4)


@pytest.mark.parametrize(
    ("method", "quantization", "dtype"),
    half_of_product(METHODS, [NF4, INT8], ["float32", "bfloat16"]),
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_every_method_learns_over_a_quantised_base(
    llama, method: MethodConfig, quantization: Quantization, dtype: str
) -> None:
    model = load(llama, quantization, dtype=dtype).model
    if (method.name, quantization) == ("dora", INT8):
        with refused(MocError):
            attach(model, method)
        return
    before = logits(model)
    adapted = attach(model, method)
    if method.name != "molex":  # which mixes layers from the first step on
        assert torch.equal(logits(model), before)
    optimizer = torch.optim.AdamW(trained(adapted), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model.train()(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with adapted.disabled():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(adapted.detach()), before)


def test_an_init_that_rewrites_the_base_is_refused(llama, packed) -> None:
    method = LoraMethod(rank=4, init="pissa")
    for model in (load(llama, NF4).model, build_meta(str(packed), kind="causal")):
        with refused(MocError):
            attach(model, method)


def test_gradients_after_an_evaluation_are_those_before(llama, monkeypatch) -> None:
    """As on a CPU with AVX512-BF16, where bitsandbytes packs weights again for an evaluation."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    model = load(llama, NF4).model
    linear = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert [m.support_avx512bf16_for_cpu for m in linear] == [False] * len(linear)
    attach(model, ControlMethod(rank=4))
    first = gradients(model)
    logits(model)
    again = gradients(model)
    assert first.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in first.items())


def test_a_model_that_was_evaluated_before_is_unpacked(tmp_path) -> None:
    """A user's own model, which was in use when controls are attached to it."""
    modules = bitsandbytes.nn.modules
    make_tiny_model("llama", hidden_size=64).save_pretrained(tmp_path)
    model = load(tmp_path, NF4).model
    before = logits(model)
    linear = next(m for m in model.modules() if isinstance(m, modules.Linear4bit))
    data = linear.weight.data.clone()
    linear.support_avx512bf16_for_cpu = True
    packing = modules._convert_weight_packed_for_cpu
    linear.weight.data, linear.weight.quant_state = packing(data, linear.weight.quant_state)
    assert linear.weight.quant_state.packing_format_for_cpu
    keep_differentiable(model)
    assert not linear.support_avx512bf16_for_cpu
    assert torch.equal(linear.weight.data, data)
    assert torch.allclose(logits(model), before, rtol=0.02, atol=0.02)  # scales in bfloat16


def test_a_folder_in_4_bits_is_recognised(llama, packed) -> None:
    stored, quantized = load(packed), load(llama, NF4)
    assert stored.quantization == NF4
    assert torch.equal(logits(stored.model), logits(quantized.model))
    assert stored.fingerprint.keys() == {"unquantized_bfloat16", "unquantized_float16"}
    assert stored.fingerprint.items() <= quantized.fingerprint.items()
    assert load(packed, NF4).weights_hash == stored.weights_hash != quantized.weights_hash
    shapes, whole = build_meta(str(packed), kind="causal"), build_meta(str(llama), kind="causal")
    counts = [attach(shape, ControlMethod(rank=4)).counts() for shape in (shapes, whole)]
    assert counts[0] == counts[1]


def test_another_quantisation_than_that_of_the_files_is_refused(packed, tmp_path) -> None:
    for make in (build_meta, load_model):
        with refused(MocError):
            make(str(packed), kind="causal", quantization=INT8)
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with refused(MocError):
        build_meta(str(tmp_path), kind="causal")


def test_heads_and_named_modules_stay_as_they_are(tmp_path) -> None:
    make_tiny_model("bert", num_labels=2).base_model.save_pretrained(tmp_path)
    name = "bert.encoder.layer.1.output.dense"
    options = {"kind": "classification", "num_labels": 2, "unquantized": [name]}
    loaded = load_model(str(tmp_path), quantization=NF4, **options)
    whole = [k for k, m in loaded.model.named_modules() if type(m) is nn.Linear]
    assert whole == [name, "bert.pooler.dense", "classifier"]
    attach(loaded.model, ControlMethod(rank=4), new_modules=("classifier", name))
    again = load_model(str(tmp_path), quantization=NF4, kind="classification", num_labels=2)
    with refused(MocError):
        api.attach(again.model, "control", rank=4, modules=[name])


def test_the_bytes_of_scales_are_counted(llama) -> None:
    model = load(llama, NF4).model
    weight = next(p for p in model.parameters() if is_quantized(p))
    sizes = [part.numel() * part.element_size() for part in parts(weight)]
    assert sizes[0] == count_numbers(weight) // 2
    assert len(sizes) == 5  # the packed numbers, scales, their own scales, and a map of each


@pytest.mark.parametrize("quantization", [NF4, INT8, Quantization(True, False, "fp4", False)])
def test_what_an_adapter_says_is_read_back(quantization: Quantization) -> None:
    assert of_arguments(json.loads(json.dumps(quantization.arguments))) == quantization
    assert of_arguments(None) is None


@pytest.mark.parametrize("method", ["lora", "dora", "molex"])
def test_other_methods_load_on_a_quantised_base(llama, tmp_path, method: str) -> None:
    model = load(llama, NF4).model
    controls = api.attach(model, method, rank=4)
    with torch.no_grad():
        for parameter in controls.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    controls.save(tmp_path / "controls")
    other = load(llama, NF4).model
    api.load_controls(other, tmp_path / "controls")
    assert torch.equal(logits(other), logits(model))


def test_controls_load_on_the_base_in_any_form(llama, packed, tmp_path) -> None:
    """Trained in one form and loaded in another: a warning says so; otherwise there is none."""
    models = {
        "unquantised": lambda: load(llama).model,
        "4-bit": lambda: load(llama, NF4).model,
        "packed": lambda: load(packed).model,
    }
    for then in ("unquantised", "4-bit", "packed"):
        model = models[then]()
        controls = api.attach(model, "moc", rank=4, gate=GATE)
        gradients(model)
        controls.save(tmp_path / then)
        expected = logits(model)
        for now, make in models.items():
            other = make()
            if {then, now} in ({"4-bit"}, {"packed"}, {"unquantised"}, {"4-bit", "packed"}):
                api.load_controls(other, tmp_path / then)
                assert torch.equal(logits(other), expected), (then, now)
            else:
                with warned(UserWarning):
                    api.load_controls(other, tmp_path / then)
    other = tmp_path / "other"
    make_tiny_model("llama", seed=3).save_pretrained(other)
    with refused(MocError):
        api.load_controls(load(other, NF4).model, tmp_path / "4-bit")
