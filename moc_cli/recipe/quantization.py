"""How a base's linear weights are kept in memory, as a recipe or adapter_config.json says it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from moc_cli.recipe.model import ModelSection
from moc_cli.recipe.schema import Recipe


@dataclass(frozen=True)
class Quantization:
    """How a base's linear weights are kept, with Hugging Face's names; embeddings, norms, biases
    and heads keep their type.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    bnb_4bit_use_double_quant: bool = True

    def __str__(self) -> str:
        if self.load_in_8bit:
            return "8-bit"
        double = ", doubly quantised" if self.bnb_4bit_use_double_quant else ""
        return f"4-bit {self.bnb_4bit_quant_type}{double}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What adapter_config.json says of it; also arguments of BitsAndBytesConfig."""
        if self.load_in_8bit:
            return {"load_in_8bit": True}
        return {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
        }


def of_arguments(arguments: Mapping[str, Any] | None) -> Quantization | None:
    """Return what `Quantization.arguments` described; None for None."""
    return Quantization(**arguments) if arguments else None


def asked_for(model: ModelSection) -> Quantization | None:
    """Return what a recipe asks for; None for weights in the type of `train.bf16`."""
    if not (model.load_in_4bit or model.load_in_8bit):
        return None
    names = [field.name for field in fields(Quantization)]
    return Quantization(**{name: getattr(model, name) for name in names})


def unquantized(recipe: Recipe) -> Recipe:
    """Return the recipe with its base in the type of `train.bf16`."""
    return recipe.changed(model={"load_in_4bit": False, "load_in_8bit": False})
