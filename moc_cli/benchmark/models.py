"""Models of the recipe's shapes with random weights; those of one base share its weights."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from moc_cli.errors import MocError
from moc_cli.models.fingerprint import in_a_layer
from moc_cli.models.load import Loaded, with_layers
from moc_cli.models.quantization import (
    import_bitsandbytes,
    keep_differentiable,
    linear_weights,
    make_config,
)
from moc_cli.recipe.quantization import Quantization, asked_for
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build


def random_base(recipe: Recipe, device: torch.device, layers: int | None = None) -> Loaded:
    """Return the recipe's base model with random weights; `layers`: only so many of its layers.

    No weights are read, and shapes that come with the program need no network. Raises MocError for
    more layers than the model has.
    """
    shape = build.base_shape(recipe)
    config = copy.deepcopy(shape.config)
    if layers is not None:
        most = config.get_text_config().num_hidden_layers
        if layers > most:
            raise MocError(
                f"--layers {layers}: {recipe.model.model_name_or_path} has"
                f" {most} layers; allowed: 1 to {most}"
            )
        config = with_layers(config, layers)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # a classifier reads where a row ends by it
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(recipe.seed)
        model = type(shape)._from_config(
            config, dtype=shape.dtype, attn_implementation=config._attn_implementation
        )
    quantization = asked_for(recipe.model)
    if quantization is not None:
        _quantize(model, quantization, device)
    fresh = build.fresh_modules(recipe, model)
    name = recipe.model.model_name_or_path
    return Loaded(model, fresh, "", name, quantization=quantization)


def _quantize(model: PreTrainedModel, quantization: Quantization, device: torch.device) -> None:
    """Quantise the linear weights of a model's layers in place, as loading a checkpoint does."""
    import_bitsandbytes()
    weights = {name.removesuffix(".weight") for name in linear_weights(model)}
    inside = {name for name in weights if in_a_layer(f"{name}.weight")}
    plain: dict[str, Any] = {name: model.get_submodule(name) for name in sorted(inside)}
    config = make_config(quantization, model.dtype, weights - inside)
    replace_with_bnb_linear(model, sorted(weights - inside), config)
    for name, module in plain.items():
        quantized: Any = model.get_submodule(name)
        weight = quantized.weight
        values = module.weight.detach().cpu()  # 8 bits are made on the way from there
        quantized.weight = type(weight)(values, requires_grad=False, **vars(weight)).to(device)
        quantized.bias = module.bias
    setattr(model, f"is_loaded_in_{8 if quantization.load_in_8bit else 4}bit", True)
    keep_differentiable(model)


def sharing_copy(base: Loaded) -> Loaded:
    """Return a copy of a model whose frozen weights are those of the model itself.

    Methods side by side then take the memory of one base.
    """
    inside = tuple(f"{name}." for name in base.new_modules)
    named = base.model.named_parameters()
    memo = {id(weight): weight for name, weight in named if not name.startswith(inside)}
    model = copy.deepcopy(base.model, memo)
    return Loaded(model, base.new_modules, "", base.source, quantization=base.quantization)


class Bases:
    """The base models of a benchmark, each made once."""

    def __init__(self, device: torch.device, layers: int | None) -> None:
        self._make: Callable[[Recipe], Loaded] = lambda recipe: random_base(recipe, device, layers)
        self._loaded: dict[str, Loaded] = {}

    def of(self, recipe: Recipe) -> Loaded:
        """Return the base of a recipe, the same one for recipes that agree on it."""
        key = f"{recipe.model.model_dump_json()} {recipe.train.bf16}"
        if key not in self._loaded:
            self._loaded[key] = self._make(recipe)
        return self._loaded[key]
