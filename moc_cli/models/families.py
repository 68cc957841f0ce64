"""The table of families: all that the package knows of each `model_type`, one entry for each.

A placement says where a block's input is read and its sum written. Paths are relative to the
model's base (`model.base_model`): `layers` to the list of layers, `read` and `write` to modules
inside one layer. A control reads the *input* of the module at `read`, the residual stream x_t
before any norm, and is added to the *output* of the module at `write`, the last one whose output is
still only f_t(x_t). Post-norm encoders have no such place: their control is added after the block's
LayerNorm (Parallel Control's code does so for the FFN).
"""

import difflib
from dataclasses import dataclass, replace

from moc_cli.errors import FamilyError
from moc_cli.models.placement import Place, Placement


@dataclass(frozen=True)
class Family:
    """What has to be known of a family beyond its own code in transformers.

    `targets` are the paths in a layer of the linear modules that LoRA adapts: q, k, v, up and down.
    `logits` names the value of the configuration with which the model changes its head's logits;
    how it does is in `models/head.py`. `writes_into_products`: a layer changes the result of a
    matrix product in place, so that it cannot be kept for the backward pass.
    """

    placement: Placement
    targets: tuple[str, ...]
    logits: str = ""
    writes_into_products: bool = False


# Pre-norm: x + attn(norm(x)), then x + mlp(norm(x)). `post_attention_layernorm` is the FFN's
# input norm, so its input is the state after the attention block and that block's control.
_PRE_NORM = Placement(
    attn=Place("input_layernorm", "self_attn"),
    ffn=Place("post_attention_layernorm", "mlp"),
)

# Norms on both sides: x + norm(attn(norm(x))), then the same for the FFN. Here
# `post_attention_layernorm` norms the attention's output, so the control is added after it, and
# `pre_feedforward_layernorm` sees the FFN's x_t.
_TWO_NORMS = Placement(
    attn=Place("input_layernorm", "post_attention_layernorm"),
    ffn=Place("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

# Pre-norm with a dropout on each block's output: the dropout belongs to f_t and a control has
# none, so the control is added after it.
_PHI3 = Placement(
    attn=Place("input_layernorm", "resid_attn_dropout"),
    ffn=Place("post_attention_layernorm", "resid_mlp_dropout"),
)

# No norm before a block, one after it: x + norm(attn(x)), then x + norm(mlp(x)). The blocks
# themselves see x_t.
_OUTPUT_NORM = Placement(
    attn=Place("self_attn", "post_attention_layernorm"),
    ffn=Place("mlp", "post_feedforward_layernorm"),
)

# Parallel residual: x + attn(norm_1(x)) + mlp(norm_2(x)), both blocks from the layer's input; the
# input of norm_2 (`post_attention_layernorm`) is that x. With `use_parallel_residual: false` it is
# the state after the attention block instead, as eq. 9 asks there. Dropouts as in phi3.
_GPT_NEOX = Placement(
    attn=Place("input_layernorm", "post_attention_dropout"),
    ffn=Place("post_attention_layernorm", "post_mlp_dropout"),
)

# Parallel residual with one norm for both blocks: x + attn(norm(x)) + mlp(norm(x)).
_COHERE = Placement(
    attn=Place("input_layernorm", "self_attn"),
    ffn=Place("input_layernorm", "mlp"),
)

# As cohere, but both blocks' outputs go through one dropout module; the controls are added after
# it, to the sum that the layer returns.
_PHI = Placement(
    attn=Place("input_layernorm", ""),
    ffn=Place("input_layernorm", ""),
)

# Post-norm: LayerNorm(x + attn(x)), then LayerNorm(x + ffn(x)). `attention` and `output` end in
# that LayerNorm, so the control is added after it.
_POST_NORM = Placement(
    layers="encoder.layer",
    attn=Place("attention.self", "attention"),
    ffn=Place("intermediate", "output"),
    causal=False,
)

# Post-norm with its LayerNorms beside the blocks.
_DISTILBERT = Placement(
    layers="transformer.layer",
    attn=Place("attention", "sa_layer_norm"),
    ffn=Place("ffn", "output_layer_norm"),
    causal=False,
)

# A pre-norm encoder. `attn_norm` of layer 0 is an Identity, because the embeddings end in a norm;
# its input is x_t all the same.
_MODERNBERT = Placement(
    attn=Place("attn_norm", "attn"),
    ffn=Place("mlp_norm", "mlp"),
    causal=False,
)

# q, k, v, up and down in each family's words. Where a model computes several of them by one matrix,
# that matrix is the target: phi3's and modernbert's up comes with its gate. Attention's output and,
# where it stands apart, the gate are left out; so are DeBERTa's projections of positions and
# qwen3_moe's experts, which are no linear modules.
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_SPLIT = (*_QKV, "mlp.up_proj", "mlp.down_proj")
_BERT_QKV = ("attention.self.query", "attention.self.key", "attention.self.value")
_BERT_FFN = ("intermediate.dense", "output.dense")
_BERT = (*_BERT_QKV, *_BERT_FFN)

FAMILIES: dict[str, Family] = {
    "llama": Family(_PRE_NORM, _SPLIT),
    "mistral": Family(_PRE_NORM, _SPLIT),
    "qwen2": Family(_PRE_NORM, _SPLIT),
    "qwen3": Family(_PRE_NORM, _SPLIT),
    "qwen3_moe": Family(_PRE_NORM, _QKV),  # the control stands beside all experts together
    "smollm3": Family(_PRE_NORM, _SPLIT),
    # x + m·attn(norm(x)), then x + m·mlp(norm(x)).
    "granite": Family(
        replace(_PRE_NORM, multiplier="residual_multiplier"), _SPLIT, logits="logits_scaling"
    ),
    "gemma2": Family(_TWO_NORMS, _SPLIT, logits="final_logit_softcapping"),
    "gemma3_text": Family(_TWO_NORMS, _SPLIT, logits="final_logit_softcapping"),
    # The text layers of the model that also sees images.
    "gemma3": Family(replace(_TWO_NORMS, layers="language_model.layers"), _SPLIT),
    "phi": Family(_PHI, (*_QKV, "mlp.fc1", "mlp.fc2")),
    "phi3": Family(_PHI3, ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    "olmo2": Family(_OUTPUT_NORM, _SPLIT),
    "gpt_neox": Family(
        _GPT_NEOX, ("attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    ),
    "cohere": Family(_COHERE, _SPLIT, logits="logit_scale"),
    "bert": Family(_POST_NORM, _BERT),
    "roberta": Family(_POST_NORM, _BERT),
    "xlm-roberta": Family(_POST_NORM, _BERT),
    "camembert": Family(_POST_NORM, _BERT),
    "electra": Family(_POST_NORM, _BERT),
    "deberta": Family(
        _POST_NORM, ("attention.self.in_proj", *_BERT_FFN), writes_into_products=True
    ),
    "deberta-v2": Family(_POST_NORM, (*(f"{name}_proj" for name in _BERT_QKV), *_BERT_FFN)),
    "distilbert": Family(
        _DISTILBERT,
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "ffn.lin1", "ffn.lin2"),
    ),
    "modernbert": Family(_MODERNBERT, ("attn.Wqkv", "mlp.Wi", "mlp.Wo")),
}


def find_family(model_type: str, layers: str = "") -> Family:
    """The entry of this `model_type`; raises FamilyError naming the known ones and what to add.

    `layers` says what the model's lists of layers hold, for the error's hint.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    raise FamilyError(
        f"model_type '{model_type}' is not in the table of families (known: "
        f"{', '.join(sorted(FAMILIES))}){guess}",
        hint="Name the places in the recipe: method.placement: {layers: <path of the layer list "
        "in the base model>, attn: {read: <module whose input is the residual stream>, write: "
        "<module whose output is added to it>}, ffn: {read: ..., write: ...}, causal: true|false}."
        + (f" This model's lists of layers: {layers}." if layers else ""),
    )
