"""Models whose layers are not alike: a placement names alternatives, each layer takes its own."""

import json

import pytest
import torch
from support.messages import refused
from support.models import train_controls
from transformers import AutoConfig, AutoModelForCausalLM

from moc_cli import attach, load_controls
from moc_cli.errors import FamilyError, RecipeError

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
PRE_NORM = ("input_layernorm", "post_attention_layernorm", "mlp")
CASES = {
    "lfm2": (
        {"layer_types": ["conv", "full_attention"] * 2},
        "conv",
        ("operator_norm", "ffn_norm", "feed_forward"),
    ),
    "qwen3_next": (
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "head_dim": 8,
            **{f"linear_{name}_head_dim": 8 for name in ("key", "value")},
            **{f"linear_num_{name}_heads": 2 for name in ("key", "value")},
            **{"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
            "shared_expert_intermediate_size": 16,
        },
        "linear_attn",
        PRE_NORM,
    ),
    "jamba": (
        {
            **{"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
            **{"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        },
        "mamba",
        ("input_layernorm", "pre_ff_layernorm", "feed_forward"),
    ),
}


def make(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SHAPE | CASES[family][0])
    return AutoModelForCausalLM.from_config(config).eval()


def placement(family: str, write: object = None) -> dict:
    _, other, (attn, ffn, output) = CASES[family]
    places = {"attn": {"read": attn, "write": write or ["self_attn", other]}}
    return {"layers": "layers", **places, "ffn": {"read": ffn, "write": output}, "causal": True}


@pytest.mark.parametrize("family", CASES)
def test_every_layer_gets_its_controls_and_they_are_saved(family, tmp_path):
    ids = torch.arange(5, 17).unsqueeze(0)
    model = make(family)
    base = model(ids).logits
    controls = attach(model, "control", rank=2, placement=placement(family))
    torch.testing.assert_close(model(ids).logits, base)
    train_controls(controls.named_parameters())
    changed = model(ids).logits
    for name, parameter in controls.named_parameters().items():
        if name.endswith(".B"):
            kept = parameter.detach().clone()
            parameter.data.zero_()
            assert not torch.equal(model(ids).logits, changed), name
            parameter.data.copy_(kept)
    controls.save(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert config["placement"]["attn"]["write"] == ["self_attn", CASES[family][1]]
    fresh = make(family)
    load_controls(fresh, tmp_path / "saved")
    torch.testing.assert_close(fresh(ids).logits, changed)


@pytest.mark.parametrize("family", CASES)
def test_a_cached_generation_is_the_uncached_one(family):
    model = make(family)
    options = {"rank": 2, "gate": {"projection_dim": 8}, "placement": placement(family)}
    controls = attach(model, "moc", **options)
    train_controls(controls.named_parameters())
    ids = torch.arange(5, 12).unsqueeze(0)
    written = [
        model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=cached, pad_token_id=0)
        for cached in (True, False)
    ]
    assert torch.equal(*written)


def test_a_layer_without_any_of_the_places_is_named():
    with refused(FamilyError, modules=r"(?<=Layer 0 holds: )conv, [\w., ]+norm"):
        attach(make("lfm2"), "control", placement=placement("lfm2", ["self_attn", "mamba"]))
    with refused(RecipeError):
        attach(make("lfm2"), "control", placement=placement("lfm2", ["self_attn", 3]))


def test_a_multiplier_that_only_the_layers_know_is_refused_until_it_is_named():
    widths = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
    changes = {"num_key_value_heads": 4, "v_head_dim": 8, "scale_depth": 1.0, **widths}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("minicpm3", **SHAPE | changes))
    attn, ffn, output = PRE_NORM
    places = {"attn": {"read": attn, "write": "self_attn"}, "ffn": {"read": ffn, "write": output}}
    places |= {"layers": "layers", "causal": True}
    with refused(FamilyError):
        attach(model, "control", placement=places)
    placed = attach(model, "control", placement=places | {"multiplier": "residual_scale"})
    assert placed.adapted.mixture.scale == 2.0
