"""Where a control goes in each block of a model's layers: what it reads, what it is added to."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """Read the input of one module, add to the output of another; "" is the layer itself.

    Where layers differ, several paths: the first that a layer has is taken.
    """

    read: str | Sequence[str]
    write: str | Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the layers are, where each block's control goes, and whether attention is causal.

    `layers` is the path of the list of layers in the model's base (`model.base_model`).
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
