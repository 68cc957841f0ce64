"""Bases whose linear weights bitsandbytes keeps in 4 or 8 bits, and all use of that package.

It is imported only where something asks for it. A quantised parameter is known by its class's name,
so that nothing has to be imported to see that there is none.
"""

import logging
from collections.abc import Collection, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from moc_cli.errors import MocError
from moc_cli.models.families import FAMILIES
from moc_cli.recipe.quantization import Quantization

# Of its modules that warn at each start: of a CPU kernel that it would have to fetch from the hub,
# and that 8-bit products are made in float16.
_NOTICES = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
_FOUR, _EIGHT = "Params4bit", "Int8Params"


def make_config(
    quantization: Quantization,
    dtype: torch.dtype,
    unquantized: Collection[str],
    *,
    split: bool = False,
) -> BitsAndBytesConfig:
    """Return what transformers loads with; products are in `dtype`, modules in `unquantized` stay.

    Weights in 4 bits that will be `split` over processes lie in tensors of `dtype`: FSDP2 takes no
    others.
    """
    extra: dict[str, Any] = {"llm_int8_skip_modules": sorted(unquantized)}
    if quantization.load_in_4bit:
        extra["bnb_4bit_compute_dtype"] = dtype
        extra["bnb_4bit_quant_storage"] = dtype if split else torch.uint8
    return BitsAndBytesConfig(**quantization.arguments, **extra)


def stored_as(name: str, config: PreTrainedConfig) -> Quantization | None:
    """Return how a checkpoint's own files are quantised, by its config; None where they are not.

    Raises MocError for another method than that of bitsandbytes.
    """
    stored_config = getattr(config, "quantization_config", None)
    if stored_config is None:
        return None
    values: dict[str, Any] = (
        stored_config if isinstance(stored_config, dict) else stored_config.to_dict()
    )
    method = values.get("quant_method") or "bitsandbytes"
    if "bitsandbytes" not in str(method):
        raise MocError(
            f"model '{name}' is quantised by {method}; allowed: unquantised weights, or 4 and 8 "
            "bits by bitsandbytes",
            "give the model that it was made from; model.load_in_4bit quantises it on loading",
        )
    if values.get("load_in_8bit"):
        return Quantization(load_in_8bit=True)
    kind = values.get("bnb_4bit_quant_type", "fp4")
    return Quantization(True, False, kind, bool(values.get("bnb_4bit_use_double_quant")))


def choose(
    name: str, config: PreTrainedConfig, requested: Quantization | None
) -> tuple[Quantization | None, bool]:
    """Return how a base is quantised in memory, as its files are or else as it is asked for, and
    whether that is done on loading.

    Raises MocError where the files are quantised in another way than is asked for, for a family
    whose code cannot have it, and where bitsandbytes is not installed.
    """
    stored = stored_as(name, config)
    if requested is not None and stored is not None and requested != stored:
        raise MocError(
            f"model '{name}' is stored in {stored}, and the recipe asks for {requested}",
            "leave model.load_in_4bit and model.load_in_8bit out, or give the unquantised model",
        )
    chosen = stored or requested
    family = FAMILIES.get(config.model_type)
    if chosen is not None and family is not None and family.writes_into_products:
        raise MocError(
            f"model '{name}' cannot have {chosen} weights: model_type '{config.model_type}' "
            "changes the product of its weights in place, which has no gradient then",
            "leave model.load_in_4bit and model.load_in_8bit out",
        )
    if chosen is not None:
        import_bitsandbytes()
    return chosen, stored is None and chosen is not None


def of_model(model: nn.Module) -> Quantization | None:
    """Return how a model in memory, or on the meta device by `build_meta`, is quantised."""
    planned = getattr(model, "quantization", None)
    if isinstance(planned, Quantization):
        return planned
    for parameter in model.parameters():
        if type(parameter).__name__ == _EIGHT:
            return Quantization(load_in_8bit=True)
        if type(parameter).__name__ == _FOUR:
            attributes = vars(parameter)
            return Quantization(
                True, False, attributes["quant_type"], bool(attributes["compress_statistics"])
            )
    return None


def is_quantized(parameter: Tensor) -> bool:
    """Whether bitsandbytes keeps this parameter in 4 or 8 bits."""
    return type(parameter).__name__ in (_FOUR, _EIGHT)


def true_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the weight that a parameter stands for: 4 bits are packed."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def count_numbers(parameter: Tensor) -> int:
    """Return how many numbers the weight has that a parameter stands for."""
    return torch.Size(true_shape(parameter)).numel()


def parts(parameter: Tensor) -> Iterator[Tensor]:
    """Yield a parameter's tensors: itself, and the scales and maps of a quantised one."""
    yield parameter
    state = getattr(parameter, "quant_state", None)
    scales = [getattr(parameter, "SCB", None)]
    for level in (state, getattr(state, "state2", None)):
        scales += [getattr(level, "absmax", None), getattr(level, "code", None)]
    yield from (tensor for tensor in scales if tensor is not None)


def linear_weights(model: nn.Module) -> set[str]:
    """Return the names of the weights of linear modules, of which some are quantised."""
    modules = model.named_modules(remove_duplicate=False)
    return {f"{name}.weight" for name, m in modules if isinstance(m, nn.Linear | Conv1D)}


def plain_linears(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Linear]]:
    """Yield each quantised linear module, and a plain one of its shape on the meta device."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and is_quantized(module.weight):
            bias = module.bias is not None
            yield module, nn.Linear(module.in_features, module.out_features, bias, device="meta")


def keep_differentiable(model: nn.Module) -> None:
    """Keep 4-bit weights in the form that has gradients.

    On a CPU with AVX512-BF16 bitsandbytes packs a weight again in the first forward of an
    evaluation, for a kernel without gradients: a later training would be wrong without an error.
    A weight that is packed so already is unpacked.
    """
    for module in model.modules():
        attributes = vars(module)
        if "support_avx512bf16_for_cpu" not in attributes:  # not a 4-bit module
            continue
        attributes["support_avx512bf16_for_cpu"] = False
        state = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            module.state_dict()  # unpacks the weight


def silence_notice() -> None:
    """Silence what bitsandbytes says at each start; peft and transformers import it themselves."""
    for name in _NOTICES:
        logging.getLogger(name).setLevel(logging.ERROR)


def has_bitsandbytes() -> bool:
    """Whether the package is installed."""
    return find_spec("bitsandbytes") is not None


def import_bitsandbytes() -> Any:
    """Return the package; raises MocError where it is not installed."""
    if not has_bitsandbytes():
        raise MocError("bitsandbytes is not installed", "pip install bitsandbytes")
    silence_notice()
    return import_module("bitsandbytes")
