"""Which linear modules of a model LoRA adapts."""

import difflib
import re

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moc_cli.errors import MocError
from moc_cli.models.families import FAMILIES
from moc_cli.models.hooks import find_list


def find_targets(model: PreTrainedModel, targets: tuple[str, ...] | None) -> list[str]:
    """The names in `model` of the linear modules to adapt; None: q, k, v, up and down.

    A target is the path of a linear module inside a layer ("output.dense") or, where no such path
    exists, the end of one ("q_proj"). Raises MocError where a target matches nothing.
    """
    linear = linear_modules(model)
    paths = sorted(set(linear.values()))
    family = FAMILIES.get(model.config.model_type)
    if targets is None and family is not None:
        targets = family.targets
    if targets is None:
        raise MocError(
            f"method.targets: what q, k, v, up and down are called in model_type "
            f"'{model.config.model_type}' is not known (known: {', '.join(sorted(FAMILIES))})",
            hint=f"Name them: method.targets: [...]. {_listing(model, paths)}",
        )
    chosen: set[str] = set()
    for target in targets:
        matches = {path for path in paths if path == target}
        matches = matches or {path for path in paths if path.endswith(f".{target}")}
        if not matches:
            raise _unmatched(model, target, paths)
        chosen |= matches
    return [name for name, path in linear.items() if path in chosen]


def linear_modules(model: PreTrainedModel) -> dict[str, str]:
    """Every linear module in a layer: its name in `model`, and its path inside the layer."""
    family = FAMILIES.get(model.config.model_type)
    below = r"(?:.*?\.)?\d+\."
    if family is not None:
        layers = find_list(model, family.placement)
        name = next(name for name, module in model.named_modules() if module is layers)
        below = rf"{re.escape(name)}\.\d+\."
    linear = {}
    for name, module in model.named_modules():
        head = re.match(below, name)
        if head and isinstance(module, nn.Linear | Conv1D):
            linear[name] = name[head.end() :]
    return linear


def _unmatched(model: PreTrainedModel, target: str, paths: list[str]) -> MocError:
    ends = {path.rsplit(".", 1)[-1]: path for path in paths}
    near = difflib.get_close_matches(target, [*paths, *ends], n=1, cutoff=0.5)
    guess = f"; did you mean '{near[0]}'?" if near else ""
    return MocError(
        f"method.targets: '{target}' matches no linear module in the layers of "
        f"{type(model).__name__}{guess}",
        hint=_listing(model, paths),
    )


def _listing(model: PreTrainedModel, paths: list[str]) -> str:
    return f"The linear modules in a layer of {type(model).__name__}: {', '.join(paths) or 'none'}."
