"""The table of families: for each `model_type`, where a block's input is read and its sum written.

Paths are relative to the model's base (`model.base_model`): `layers` to the list of layers, `read`
and `write` to modules inside one layer. A control reads the *input* of the module at `read`, the
residual stream x_t before any norm, and is added to the *output* of the module at `write`, the
last one whose output is still only f_t(x_t). Post-norm encoders have no such place: their control
is added after the block's LayerNorm (Parallel Control's code does so for the FFN).
"""

import difflib
from dataclasses import dataclass

from moc_cli.errors import FamilyError


@dataclass(frozen=True)
class Port:
    """Read the input of one module, add to the output of another; "" is the layer itself."""

    read: str
    write: str


@dataclass(frozen=True)
class Family:
    """Where the layers are, where each block's control goes, and whether attention is causal."""

    layers: str
    attn: Port
    ffn: Port
    causal: bool

    def port(self, block: str) -> Port:
        return self.attn if block == "attn" else self.ffn


# Pre-norm: x + attn(norm(x)), then x + mlp(norm(x)). `post_attention_layernorm` is the FFN's
# input norm, so its input is the state after the attention block and that block's control.
_PRE_NORM = Family(
    layers="layers",
    attn=Port("input_layernorm", "self_attn"),
    ffn=Port("post_attention_layernorm", "mlp"),
    causal=True,
)

# Post-norm: LayerNorm(x + attn(x)), then LayerNorm(x + ffn(x)). `attention` and `output` end in
# that LayerNorm, so the control is added after it.
_POST_NORM = Family(
    layers="encoder.layer",
    attn=Port("attention.self", "attention"),
    ffn=Port("intermediate", "output"),
    causal=False,
)

FAMILIES: dict[str, Family] = {
    "llama": _PRE_NORM,
    "bert": _POST_NORM,
    "roberta": _POST_NORM,
}


def find_family(model_type: str) -> Family:
    """The entry of this `model_type`; raises FamilyError naming the known ones and what to add."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    raise FamilyError(
        f"model_type '{model_type}' is not in the table of families (known: "
        f"{', '.join(sorted(FAMILIES))}){guess}",
        hint="Name the places in the recipe: method.placement: {layers: <path of the layer list "
        "in the base model>, attn: {read: <module whose input is the residual stream>, write: "
        "<module whose output is added to it>}, ffn: {read: ..., write: ...}, causal: true|false}.",
    )
