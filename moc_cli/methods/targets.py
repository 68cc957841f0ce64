"""Which linear modules of a model LoRA adapts."""

import difflib
import re

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from moc_cli.errors import MocError
from moc_cli.models.families import FAMILIES
from moc_cli.models.hooks import find_list

_SPLIT = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_BERT = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "intermediate.dense",
    "output.dense",
)

# q, k, v, up and down in each family's words. Where a model computes several of them by one matrix,
# that matrix is the target: phi3's and modernbert's up comes with its gate. Attention's output and,
# where it stands apart, the gate are left out; so are DeBERTa's projections of positions and
# qwen3_moe's experts, which are no linear modules.
TARGETS: dict[str, tuple[str, ...]] = {
    "llama": _SPLIT,
    "mistral": _SPLIT,
    "qwen2": _SPLIT,
    "qwen3": _SPLIT,
    "qwen3_moe": _SPLIT[:3],
    "smollm3": _SPLIT,
    "granite": _SPLIT,
    "gemma2": _SPLIT,
    "gemma3_text": _SPLIT,
    "gemma3": _SPLIT,
    "phi": (*_SPLIT[:3], "mlp.fc1", "mlp.fc2"),
    "phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"),
    "olmo2": _SPLIT,
    "gpt_neox": ("attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "cohere": _SPLIT,
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "deberta": ("attention.self.in_proj", "intermediate.dense", "output.dense"),
    "deberta-v2": (
        "attention.self.query_proj",
        "attention.self.key_proj",
        "attention.self.value_proj",
        "intermediate.dense",
        "output.dense",
    ),
    "distilbert": (
        "attention.q_lin",
        "attention.k_lin",
        "attention.v_lin",
        "ffn.lin1",
        "ffn.lin2",
    ),
    "modernbert": ("attn.Wqkv", "mlp.Wi", "mlp.Wo"),
}


def find_targets(model: PreTrainedModel, targets: tuple[str, ...] | None) -> list[str]:
    """The names in `model` of the linear modules to adapt; None: q, k, v, up and down.

    A target is the path of a linear module inside a layer ("output.dense") or, where no such path
    exists, the end of one ("q_proj"). Raises MocError where a target matches nothing.
    """
    linear = linear_modules(model)
    paths = sorted(set(linear.values()))
    if targets is None:
        targets = TARGETS.get(model.config.model_type)
    if targets is None:
        raise MocError(
            f"method.targets: what q, k, v, up and down are called in model_type "
            f"'{model.config.model_type}' is not known (known: {', '.join(sorted(TARGETS))})",
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
        layers = find_list(model, family)
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
