"""LoRA and DoRA over a bfloat16 base, as their users run them: under autocast.

The weights stay in float32 for the optimizer; their products are made in bfloat16, as those of the
base and of controls are.
"""

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.nn import functional as F

HALF = torch.bfloat16


class HalfLinear(nn.Linear):
    """A linear map with float32 weights and a product in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(HALF), self.weight.to(HALF))


class HalfDora(DoraLinearLayer):
    """DoRA's rescaling with the products in bfloat16; norms stay in float32."""

    def forward(self, x: Tensor, **kwargs: object) -> Tensor:
        with torch.autocast(x.device.type, dtype=HALF):
            scaled: Tensor = super().forward(x, **kwargs)
            return scaled

    @torch.no_grad()
    def reset_magnitudes(self, layer: LoraLayer, name: str) -> None:
        """Set the magnitudes to the norms that `forward` divides by: peft rounds them to bfloat16,
        and the model would not start as its base.
        """
        with torch.autocast(self.weight.device.type, dtype=HALF):
            delta = self.get_lora_weight(lora_A=layer.lora_A[name], lora_B=layer.lora_B[name])
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            norms = self.get_weight_norm(weight, delta.float(), layer.scaling[name])
        self.weight.copy_(norms)


def multiply_in_half(layer: LoraLayer, name: str) -> None:
    """Let the adapter `name` of a layer make its products in bfloat16."""
    for table in (layer.lora_A, layer.lora_B):
        linear = table[name]
        half = HalfLinear(linear.in_features, linear.out_features, bias=False, device="meta")
        half.weight = linear.weight
        table[name] = half.train(linear.training)
    if name in layer.lora_magnitude_vector:
        dora = layer.lora_magnitude_vector[name]
        dora.__class__ = HalfDora
        if not dora.weight.is_meta:
            dora.reset_magnitudes(layer, name)
    else:  # the input is then used as it is, without a copy in float32
        layer.cast_input_dtype_enabled = False
