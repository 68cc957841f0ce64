"""The `method` section: one closed class for each method, chosen by `name`.

To add a method: write its class with a `name: Literal["..."]` and add it to `MethodConfig`.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from moc_cli.recipe.types import (
    AboveZero,
    AtLeastZero,
    BelowOne,
    Count,
    Counts,
    OpenShare,
    Positive,
    PositiveShare,
    Section,
    Share,
    Text,
    Texts,
    Width,
    section,
)

Paths = str | Annotated[list[str], Field(min_length=1)]
Sites = Literal["attn", "ffn", "attn+ffn"]


class PlaceSection(Section):
    """Where one control is attached: paths of modules inside a layer; "" is the layer itself."""

    read: Paths = Field(
        description="path of the module whose input is the residual stream x_t; where layers "
        "differ, a list of paths, of which each layer takes the first that it has"
    )
    write: Paths = Field(
        description="path, or list of paths, of the module whose output the control is added to"
    )


class PlacementSection(Section):
    """Where the controls are attached in a model whose family is not built in."""

    layers: Text = Field(description="path of the list of layers inside the base model")
    attn: PlaceSection = Field(description="where the control of the attention block is attached")
    ffn: PlaceSection = Field(description="where the control of the FFN block is attached")
    causal: bool = Field(description="true for a decoder, false for an encoder")
    multiplier: Text | None = Field(
        default=None,
        description="name of the value in the model's config, or of its layers, with which it "
        "multiplies a block's output before adding it; the controls are divided by it",
    )


class _GateSection(Section):
    """What the gates of controls and of layers share."""

    kind: Literal["cosine", "linear"] = Field(
        default="cosine",
        description="cosine: similarity in a projected space; linear: W x",
    )
    projection_dim: Width = Field(default=256, description="dimension of the cosine gate's space")
    learning_rate: AboveZero | None = Field(
        default=None,
        description="peak learning rate of the gate, and of a learned weight, in moc "
        "train; "
        "null: train.learning_rate",
    )


class GateSection(_GateSection):
    """How the gate scores the controls."""

    estimator: Literal["renormalized", "straight_through", "probability"] = Field(
        default="renormalized",
        description="how the routed controls are weighted, and how the gate gets its gradient",
    )


class RoutingSection(Section):
    """Which tokens decide about the routed controls, and how their votes are counted."""

    level: Literal["batch", "sample", "token"] = Field(
        default="batch",
        description="in training, one decision for each batch, sample (row) or token",
    )
    vote: Literal["mean", "mode"] = Field(
        default="mean",
        description="mean: highest mean probability; mode: most often in a token's top K",
    )
    exclude_local: bool = Field(
        default=False, description="a site may not route to its own control"
    )
    decode: Literal["frozen", "running"] = Field(
        default="frozen",
        description="during generation, frozen: keep the route of the prompt; "
        "running: update it with each new token",
    )
    sync: bool = Field(
        default=False,
        description="in training by several processes, one decision for the batches of all",
    )


class BalanceSection(Section):
    """The loss that keeps all controls in use."""

    weight: AtLeastZero = Field(default=0.01, description="factor lambda of the loss; 0: no loss")
    f: Literal["top_k", "choice"] = Field(
        default="top_k",
        description="f_j counts, top_k: each token's own top K; choice: the controls that are used",
    )
    reduce: Literal["sum", "mean"] = Field(
        default="sum", description="over the losses of the sites"
    )


class _Controls(Section):
    """What every method of controls has."""

    name: str
    rank: Positive = Field(default=64, description="rank r of each control")
    scale: AboveZero = Field(default=1.0, description="factor of the output of each control")
    sites: Sites = Field(default="attn+ffn", description="blocks that get a control")
    placement: PlacementSection | None = Field(
        default=None,
        description="where controls are attached, for a model whose family is not built in",
    )


class MocMethod(_Controls):
    """Mixture-of-Control: a local control at each site, plus K routed ones from a shared pool."""

    name: Literal["moc"] = Field(default="moc", description="name of the method")
    share_gate: bool = Field(
        default=True,
        description="true: one gate and one pool for both sites; false: one for each site",
    )
    alpha: Share = Field(
        default=0.95,
        description="weight of the local control; the routed controls get 1 - alpha",
    )
    top_k: Count = Field(default=1, description="number K of routed controls; 0: method control")
    gate: GateSection = section("how controls are scored")
    routing: RoutingSection = section("which tokens decide about the routed controls, and how")
    balance: BalanceSection = section("the load-balance loss")


class ControlMethod(_Controls):
    """Parallel Control: a control at each site, without routing."""

    name: Literal["control"] = Field(default="control", description="name of the method")


REWRITING_INITS = ("pissa", "olora")  # how the inits begin that rewrite the base's weights
Init = Literal[
    "default", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "orthogonal"
]
MixWeight = PositiveShare | Literal["learned"]


class _LowRankMethod(Section):
    """What the methods of low-rank updates share."""

    name: str
    rank: Positive = Field(default=32, description="rank r of A and B")
    alpha: Positive = Field(default=64, description="the product is scaled by alpha/rank")
    dropout: BelowOne = Field(default=0.05, description="dropout rate on the input of A")
    targets: Texts | None = Field(
        default=None,
        description="names of linear modules in a layer; null: the query, key, value, up and down "
        "projections",
    )


class LoraMethod(_LowRankMethod):
    """LoRA through peft: W x + alpha/rank · B A x in chosen linear modules."""

    name: Literal["lora"] = Field(default="lora", description="name of the method")
    init: Init = Field(default="default", description="initialization of A and B, by peft's names")


class DoraMethod(_LowRankMethod):
    """DoRA through peft: LoRA on the direction of each weight, and a learned magnitude."""

    name: Literal["dora"] = Field(default="dora", description="name of the method")
    init: Init = Field(default="default", description="initialization of A and B, by peft's names")


class LayerGateSection(_GateSection):
    """How the gate scores the layers."""

    bias: bool = Field(default=False, description="a bias in the gate's linear map")


class LayerBalanceSection(Section):
    """The loss that keeps all layers in use."""

    weight: AtLeastZero = Field(default=0.01, description="factor lambda of the loss; 0: no loss")


class MolexMethod(_LowRankMethod):
    """Mixture of Layer Experts: each layer, with LoRA, mixed with another that a gate picks."""

    name: Literal["molex"] = Field(default="molex", description="name of the method")
    weight: MixWeight = Field(
        default=0.95,
        description="weight of the layer itself, or learned; the second layer gets the rest",
    )
    weight_start: OpenShare = Field(default=0.95, description="first value of a learned weight")
    vote: Literal["mean", "mode"] = Field(
        default="mean",
        description="mean: the tokens' mean probabilities decide; mode: the tokens' counted picks",
    )
    mixed_layers: Counts | None = Field(
        default=None,
        description="numbers, from 0, of the layers that mix in a second one, which may be any "
        "layer; null: all",
    )
    gate: LayerGateSection = section("how layers are scored")
    balance: LayerBalanceSection = section("the load-balance loss")


MethodConfig = MocMethod | ControlMethod | LoraMethod | DoraMethod | MolexMethod

METHODS: dict[str, type[Section]] = {
    cls.model_fields["name"].default: cls for cls in get_args(MethodConfig)
}


def expand_method(value: Any) -> Any:
    """Return the short form `method: moc` as a section with that method's defaults."""
    if value is None:
        return {}
    return {"name": value} if isinstance(value, str) else value


_Names: Any = Literal[tuple(METHODS)]
_Full = Annotated[MethodConfig, Field(discriminator="name")]
MethodSection = Annotated[
    _Full, BeforeValidator(expand_method, json_schema_input_type=_Names | _Full)
]
