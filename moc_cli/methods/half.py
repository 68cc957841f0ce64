"""LoRA and DoRA over a base in half precision: in bfloat16 as under autocast.

The weights stay in float32 for the optimizer; their products are made in bfloat16, as those of the
base and of controls are.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

HALF = torch.bfloat16


class HalfLinear(nn.Linear):
    """A linear map with float32 weights and a product in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(HALF), self.weight.to(HALF))


class _HalfProducts(TorchFunctionMode):
    """What autocast does to linear products, for the meta device, on which a training is planned
    and which has no autocast.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            args = tuple(arg.to(HALF) if isinstance(arg, Tensor) else arg for arg in args)
        return func(*args, **(kwargs or {}))


def _products_in_half(device: torch.device) -> AbstractContextManager[Any]:
    return _HalfProducts() if device.type == "meta" else torch.autocast(device.type, dtype=HALF)


class HalfDora(DoraLinearLayer):
    """DoRA's rescaling with the products in bfloat16; norms stay in float32."""

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        with _products_in_half(x.device):
            scaled: Tensor = super().forward(x, **kwargs)
            return scaled


@torch.no_grad()
def reset_magnitudes(layer: LoraLayer, name: str) -> None:
    """Set DoRA's magnitudes, where there are some, to the norms that its products are divided by:
    peft rounds them to the base's type, and the model would not start as its base.
    """
    if name not in layer.lora_magnitude_vector or layer.lora_magnitude_vector[name].weight.is_meta:
        return
    dora = layer.lora_magnitude_vector[name]
    in_half = isinstance(dora, HalfDora)
    with torch.autocast(dora.weight.device.type, dtype=HALF, enabled=in_half):
        delta = dora.get_lora_weight(lora_A=layer.lora_A[name], lora_B=layer.lora_B[name])
        weight = dequantize_module_weight(layer.get_base_layer()).float()
        norms = dora.get_weight_norm(weight, delta.float(), layer.scaling[name])
    dora.weight.copy_(norms)


def multiply_in_half(layer: LoraLayer, name: str) -> None:
    """Let the adapter `name` of a layer make its products in bfloat16."""
    for table in (layer.lora_A, layer.lora_B):
        linear = table[name]
        half = HalfLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        half.weight = linear.weight
        table[name] = half.train(linear.training)
    if name in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[name].__class__ = HalfDora
    else:  # the input is then used as it is, without a copy in float32
        layer.cast_input_dtype_enabled = False
