"""The table of families: for each `model_type`, where a block's input is read and its sum written.

Paths are relative to the model's base (`model.base_model`): `layers` to the list of layers, `read`
and `write` to modules inside one layer. A control reads the *input* of the module at `read`, the
residual stream x_t before any norm, and is added to the *output* of the module at `write`, the
last one whose output is still only f_t(x_t). Post-norm encoders have no such place: their control
is added after the block's LayerNorm (Parallel Control's code does so for the FFN).
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moc_cli.errors import FamilyError


@dataclass(frozen=True)
class Place:
    """Read the input of one module, add to the output of another; "" is the layer itself.

    Where layers differ, several paths: the first that a layer has is taken.
    """

    read: str | Sequence[str]
    write: str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where the layers are, where each block's control goes, and whether attention is causal.

    `multiplier` names the value of the configuration with which the model multiplies a block's
    output before it is added to the residual stream; the controls are divided by it.
    """

    layers: str = "layers"
    attn: Place
    ffn: Place
    causal: bool = True
    multiplier: str = ""

    def place(self, block: str) -> Place:
        return self.attn if block == "attn" else self.ffn


# Pre-norm: x + attn(norm(x)), then x + mlp(norm(x)). `post_attention_layernorm` is the FFN's
# input norm, so its input is the state after the attention block and that block's control.
_PRE_NORM = Family(
    attn=Place("input_layernorm", "self_attn"),
    ffn=Place("post_attention_layernorm", "mlp"),
)

# Norms on both sides: x + norm(attn(norm(x))), then the same for the FFN. Here
# `post_attention_layernorm` norms the attention's output, so the control is added after it, and
# `pre_feedforward_layernorm` sees the FFN's x_t.
_TWO_NORMS = Family(
    attn=Place("input_layernorm", "post_attention_layernorm"),
    ffn=Place("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)

# Pre-norm with a dropout on each block's output: the dropout belongs to f_t and a control has
# none, so the control is added after it.
_PHI3 = Family(
    attn=Place("input_layernorm", "resid_attn_dropout"),
    ffn=Place("post_attention_layernorm", "resid_mlp_dropout"),
)

# No norm before a block, one after it: x + norm(attn(x)), then x + norm(mlp(x)). The blocks
# themselves see x_t.
_OUTPUT_NORM = Family(
    attn=Place("self_attn", "post_attention_layernorm"),
    ffn=Place("mlp", "post_feedforward_layernorm"),
)

# Parallel residual: x + attn(norm_1(x)) + mlp(norm_2(x)), both blocks from the layer's input; the
# input of norm_2 (`post_attention_layernorm`) is that x. With `use_parallel_residual: false` it is
# the state after the attention block instead, as eq. 9 asks there. Dropouts as in phi3.
_GPT_NEOX = Family(
    attn=Place("input_layernorm", "post_attention_dropout"),
    ffn=Place("post_attention_layernorm", "post_mlp_dropout"),
)

# Parallel residual with one norm for both blocks: x + attn(norm(x)) + mlp(norm(x)).
_COHERE = Family(
    attn=Place("input_layernorm", "self_attn"),
    ffn=Place("input_layernorm", "mlp"),
)

# As cohere, but both blocks' outputs go through one dropout module; the controls are added after
# it, to the sum that the layer returns.
_PHI = Family(
    attn=Place("input_layernorm", ""),
    ffn=Place("input_layernorm", ""),
)

# Post-norm: LayerNorm(x + attn(x)), then LayerNorm(x + ffn(x)). `attention` and `output` end in
# that LayerNorm, so the control is added after it.
_POST_NORM = Family(
    layers="encoder.layer",
    attn=Place("attention.self", "attention"),
    ffn=Place("intermediate", "output"),
    causal=False,
)

# Post-norm with its LayerNorms beside the blocks.
_DISTILBERT = Family(
    layers="transformer.layer",
    attn=Place("attention", "sa_layer_norm"),
    ffn=Place("ffn", "output_layer_norm"),
    causal=False,
)

# A pre-norm encoder. `attn_norm` of layer 0 is an Identity, because the embeddings end in a norm;
# its input is x_t all the same.
_MODERNBERT = Family(
    attn=Place("attn_norm", "attn"),
    ffn=Place("mlp_norm", "mlp"),
    causal=False,
)

FAMILIES: dict[str, Family] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "qwen3_moe": _PRE_NORM,  # the control stands beside all experts together
    "smollm3": _PRE_NORM,
    # x + m·attn(norm(x)), then x + m·mlp(norm(x)).
    "granite": replace(_PRE_NORM, multiplier="residual_multiplier"),
    "gemma2": _TWO_NORMS,
    "gemma3_text": _TWO_NORMS,
    # The text layers of the model that also sees images.
    "gemma3": replace(_TWO_NORMS, layers="language_model.layers"),
    "phi": _PHI,
    "phi3": _PHI3,
    "olmo2": _OUTPUT_NORM,
    "gpt_neox": _GPT_NEOX,
    "cohere": _COHERE,
    "bert": _POST_NORM,
    "roberta": _POST_NORM,
    "xlm-roberta": _POST_NORM,
    "camembert": _POST_NORM,
    "electra": _POST_NORM,
    "deberta": _POST_NORM,
    "deberta-v2": _POST_NORM,
    "distilbert": _DISTILBERT,
    "modernbert": _MODERNBERT,
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
