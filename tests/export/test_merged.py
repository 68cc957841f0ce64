"""How low-rank updates are folded into a base in half precision."""

from types import SimpleNamespace

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support.models import make_byte_tokenizer, make_tiny_model

from moc_cli.export import FormatOptions, merged, parity
from moc_cli.kinds import Choice
from moc_cli.methods import attach
from moc_cli.recipe.methods import LoraMethod


def test_updates_are_added_in_float32_and_rounded_once(tmp_path, monkeypatch):
    model = make_tiny_model("llama", dtype=torch.bfloat16)
    adapted = attach(model, LoraMethod(rank=4), new_modules=(), seed=1)
    expected = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            torch.nn.init.normal_(b, std=0.1)
            update = (b.float() @ a.float()) * module.scaling["default"]
            expected[name] = (module.base_layer.weight.float() + update).bfloat16()
    monkeypatch.setattr(parity, "reference", lambda trained: None)
    trained = SimpleNamespace(
        adapted=adapted,
        dtype="bfloat16",
        tokenizer=make_byte_tokenizer(),
        kind=Choice(),
        recipe=SimpleNamespace(model=SimpleNamespace(attn_implementation=None)),
    )
    merged.export(trained, tmp_path, FormatOptions())
    saved = load_file(tmp_path / "model.safetensors")
    assert expected
    assert all(torch.equal(saved[f"{name}.weight"], values) for name, values in expected.items())
