"""The `method` section: one closed class a method, told apart by `name`.

To add a method: write its class with a `name: Literal["..."]` and name it in `MethodConfig`.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from moc_cli.recipe.types import (
    AboveZero,
    AtLeastZero,
    BelowOne,
    Count,
    Positive,
    PositiveShare,
    Section,
    Share,
    Text,
    one_or_more,
    section,
)

Sites = Literal["attn", "ffn", "attn+ffn"]


class Place(Section):
    """Where one control is attached, as paths of modules inside a layer; "" is the layer itself."""

    read: str = Field(description="module whose input is the residual stream x_t")
    write: str = Field(description="module to whose output the control is added")


class Placement(Section):
    """Where the controls go in a model that the table of families does not know."""

    layers: Text = Field(description="path of the list of layers inside the base model")
    attn: Place = Field(description="places of the attention site")
    ffn: Place = Field(description="places of the FFN site")
    causal: bool = Field(description="true for decoders, false for encoders")


class Gate(Section):
    """How the gate scores the controls."""

    kind: Literal["cosine", "linear"] = Field(
        default="cosine", description="cosine similarity in a projected space, or W x"
    )
    projection_dim: Positive = Field(
        default=256, description="width of the cosine gate's projection"
    )
    estimator: Literal["renormalized", "straight_through", "probability"] = Field(
        default="renormalized", description="weights of the routed controls and their gradient"
    )


class Routing(Section):
    """Who votes for the routed controls, and how votes are counted."""

    level: Literal["batch", "sample", "token"] = Field(
        default="batch", description="who decides together in training"
    )
    vote: Literal["mean", "mode"] = Field(
        default="mean", description="rank the mean probability, or count each voter's top K"
    )
    exclude_local: bool = Field(
        default=False, description="a site may not route to its own control"
    )
    decode: Literal["frozen", "running"] = Field(
        default="frozen", description="keep the prompt's route, or update it with each new token"
    )


class Balance(Section):
    """The loss that keeps all controls in use."""

    weight: AtLeastZero = Field(default=0.01, description="lambda; 0 switches the loss off")
    f: Literal["top_k", "choice"] = Field(
        default="top_k", description="f_j from each token's own top K, or from the batch's choice"
    )
    reduce: Literal["sum", "mean"] = Field(default="sum", description="over the sites")


class MocMethod(Section):
    """Mixture-of-Control: a local control at each site, plus K routed ones from a shared pool."""

    name: Literal["moc"] = Field(default="moc", description="the method")
    rank: Positive = Field(default=64, description="rank r of each control")
    scale: AboveZero = Field(default=1.0, description="factor of every control's output")
    sites: Sites = Field(default="attn+ffn", description="blocks that hold a control")
    share_gate: bool = Field(
        default=True, description="one gate and pool for both sites, or one for each"
    )
    alpha: Share = Field(default=0.95, description="weight of the local control; 1-alpha is routed")
    top_k: Count = Field(default=1, description="routed controls K; 0 is the method control")
    gate: Gate = section("how controls are scored")
    routing: Routing = section("who votes, and how")
    balance: Balance = section("the load-balance loss")
    placement: Placement | None = Field(
        default=None, description="where controls go in a model of unknown family"
    )


class ControlMethod(Section):
    """Parallel Control: a control at each site, none routed."""

    name: Literal["control"] = Field(default="control", description="the method")
    rank: Positive = Field(default=64, description="rank r of each control")
    scale: AboveZero = Field(default=1.0, description="factor of every control's output")
    sites: Sites = Field(default="attn+ffn", description="blocks that hold a control")
    placement: Placement | None = Field(
        default=None, description="where controls go in a model of unknown family"
    )


Init = Literal[
    "default", "gaussian", "pissa", "pissa_niter_4", "pissa_niter_16", "olora", "orthogonal"
]
Targets = Annotated[list[Text], BeforeValidator(one_or_more), Field(min_length=1)]
MixWeight = PositiveShare | Literal["learned"]


class LoraMethod(Section):
    """LoRA through peft: W x + alpha/rank · B A x in chosen linear modules."""

    name: Literal["lora"] = Field(default="lora", description="the method")
    rank: Positive = Field(default=32, description="rank r of A and B")
    alpha: Positive = Field(default=64, description="the product is scaled by alpha/rank")
    dropout: BelowOne = Field(default=0.05, description="dropout of A's input")
    init: Init = Field(default="default", description="how A and B start (peft's names)")
    targets: Targets | None = Field(
        default=None, description="linear modules of a layer; null is q, k, v, up and down"
    )


class DoraMethod(Section):
    """DoRA through peft: LoRA on the direction of each weight, and a learned magnitude."""

    name: Literal["dora"] = Field(default="dora", description="the method")
    rank: Positive = Field(default=32, description="rank r of A and B")
    alpha: Positive = Field(default=64, description="the product is scaled by alpha/rank")
    dropout: BelowOne = Field(default=0.05, description="dropout of A's input")
    init: Init = Field(default="default", description="how A and B start (peft's names)")
    targets: Targets | None = Field(
        default=None, description="linear modules of a layer; null is q, k, v, up and down"
    )


class LayerGate(Section):
    """How the gate scores the layers."""

    kind: Literal["cosine", "linear"] = Field(
        default="cosine", description="cosine similarity in a projected space, or W x"
    )
    projection_dim: Positive = Field(
        default=256, description="width of the cosine gate's projection"
    )


class LayerBalance(Section):
    """The loss that keeps all layers in use."""

    weight: AtLeastZero = Field(default=0.01, description="lambda; 0 switches the loss off")


class MolexMethod(Section):
    """Mixture of Layer Experts: each layer, with LoRA, mixed with one that a shared gate picks."""

    name: Literal["molex"] = Field(default="molex", description="the method")
    rank: Positive = Field(default=32, description="rank r of A and B")
    alpha: Positive = Field(default=64, description="the product is scaled by alpha/rank")
    dropout: BelowOne = Field(default=0.05, description="dropout of A's input")
    targets: Targets | None = Field(
        default=None, description="linear modules of a layer; null is q, k, v, up and down"
    )
    weight: MixWeight = Field(
        default=0.95, description="weight of the layer itself, or learned; the rest is the second's"
    )
    gate: LayerGate = section("how layers are scored")
    balance: LayerBalance = section("the load-balance loss")


MethodConfig = MocMethod | ControlMethod | LoraMethod | DoraMethod | MolexMethod

METHODS: dict[str, type[Section]] = {
    cls.model_fields["name"].default: cls for cls in get_args(MethodConfig)
}


def expand_method(value: Any) -> Any:
    """Return the short form `method: moc` as a section with that method's defaults."""
    if value is None:
        return {}
    return {"name": value} if isinstance(value, str) else value


MethodSection = Annotated[
    Annotated[MethodConfig, Field(discriminator="name")], BeforeValidator(expand_method)
]
