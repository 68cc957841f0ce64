"""Methods: what is trained, placed in a model by `attach`."""

from typing import Any

from transformers import PreTrainedModel

from moc_cli.methods.adapted import Adapted, Counts, FreshModules, Placed, TextModel
from moc_cli.models.quantization import count_numbers, keep_differentiable, silence_notice

__all__ = ["Adapted", "Counts", "TextModel", "attach", "bare"]


def _place(model: PreTrainedModel, method: Any, seed: int) -> Placed:
    """Place a method; peft takes seconds to import, which moc and control are spared."""
    if method.name in ("moc", "control"):
        from moc_cli.methods.controls import ControlsMethod

        return ControlsMethod(model, method, seed)
    silence_notice()
    from moc_cli.methods.low_rank import LowRank
    from moc_cli.methods.molex import Molex

    return (Molex if method.name == "molex" else LowRank)(model, method, seed)


def attach(
    model: PreTrainedModel, method: Any, *, new_modules: tuple[str, ...] = (), seed: int = 42
) -> Adapted:
    """Freeze the model and place a method (a recipe's `method` section) in it.

    `new_modules` names the modules that the checkpoint lacked: they are trained and saved whole.
    Raises MocError where the method cannot be placed, with the model unchanged.
    """
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    fresh_size = sum(
        p.numel() for name in new_modules for p in model.get_submodule(name).parameters()
    )
    keep_differentiable(model)
    base = sum(map(count_numbers, model.parameters())) - fresh_size
    placed = _place(model, method, seed)
    model.requires_grad_(False)
    fresh = FreshModules(model, new_modules)
    return Adapted(model, placed, fresh, required, base)


def bare(model: PreTrainedModel) -> Adapted:
    """The model with no method in it; nothing is frozen, and nothing is trained."""
    size = sum(map(count_numbers, model.parameters()))
    return Adapted(model, Placed(), FreshModules(model, ()), {}, size)
