"""Models of the recipe's shapes with random weights; those of one base share its weights."""

import copy
from collections.abc import Callable

import torch

from moc_cli.models.load import Loaded
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build


def random_base(recipe: Recipe, device: torch.device, layers: int | None = None) -> Loaded:
    """Return the recipe's base model with random weights; `layers`: only so many of its layers.

    No weights are read, and shapes that come with the program need no network.
    """
    shape = build.base_shape(recipe)
    config = copy.deepcopy(shape.config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # a classifier reads where a row ends by it
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(recipe.seed)
        model = type(shape)._from_config(
            config, dtype=shape.dtype, attn_implementation=config._attn_implementation
        )
    name = recipe.model.model_name_or_path
    return Loaded(model, build.fresh_modules(recipe, model), "", name)


def sharing_copy(base: Loaded) -> Loaded:
    """Return a copy of a model whose frozen weights are those of the model itself.

    Methods side by side then take the memory of one base.
    """
    inside = tuple(f"{name}." for name in base.new_modules)
    named = base.model.named_parameters()
    memo = {id(weight): weight for name, weight in named if not name.startswith(inside)}
    return Loaded(copy.deepcopy(base.model, memo), base.new_modules, "", base.source)


class Bases:
    """The base models of a benchmark, each made once."""

    def __init__(self, device: torch.device, layers: int | None) -> None:
        self._make: Callable[[Recipe], Loaded] = lambda recipe: random_base(recipe, device, layers)
        self._made: dict[str, Loaded] = {}

    def of(self, recipe: Recipe) -> Loaded:
        """Return the base of a recipe, the same one for recipes that agree on it."""
        key = f"{recipe.model.model_dump_json()} {recipe.train.bf16}"
        if key not in self._made:
            self._made[key] = self._make(recipe)
        return self._made[key]
