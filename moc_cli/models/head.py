"""A language model's head apart from its base: logits are made only where they are read."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moc_cli.models.families import FAMILIES
from moc_cli.nn.token_loss import summed_loss, token_log_probs

# Logits at a time, but at least those of so many positions: fewer leave a GPU idle.
CHUNK, LEAST = 2**23, 256
# What a family does to the logits of its head, by the value of its configuration that says how much
# (`Family.logits`). No value: nothing.
_CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "logit_scale": lambda logits, scale: logits * scale,
    "logits_scaling": lambda logits, scale: logits / scale,
    "final_logit_softcapping": lambda logits, cap: torch.tanh(logits / cap) * cap,
}


class Head:
    """The head of a language model, for losses and log-probabilities at chosen positions.

    With `training` the head must be frozen too. Otherwise, and for a model of another class than
    those of the table of families, `reason` says why the model computes the logits of all
    positions itself; results are the same.
    """

    def __init__(self, model: nn.Module, *, training: bool = False) -> None:
        self.reason = _why_whole(model, training)
        self._runner: Any = model
        self._module: nn.Module | None = None
        if self.reason is None:
            assert isinstance(model, PreTrainedModel)
            self._runner, self._module = model.base_model, model.get_output_embeddings()
            config = model.config.get_text_config()
            key = FAMILIES[model.config.model_type].logits
            self._change, self._value = _CHANGES.get(key), getattr(config, key, None)
            self._vocabulary: int = config.vocab_size
        self._arguments = signature(self._runner.forward).parameters

    def run(self, inputs: dict[str, Any], *, last: int | None = None) -> tuple[Tensor, Any]:
        """Call the model on inputs (B, T): what `loss` and `log_probs` need of it, and its cache.

        With `last` only of that many positions at the end. Leaves out position_ids where the model
        does not know them.
        """
        is_whole_model = self._module is None
        if is_whole_model and last is not None and "logits_to_keep" in self._arguments:
            inputs = inputs | {"logits_to_keep": last}
        if "position_ids" not in self._arguments:
            inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
        outputs = self._runner(**inputs)
        states: Tensor = outputs.logits if is_whole_model else outputs.last_hidden_state
        cache = getattr(outputs, "past_key_values", None)
        return states if last is None else states[:, -last:], cache

    def logits(self, states: Tensor) -> Tensor:
        """What the model makes of its last hidden states (n, d): logits (n, V)."""
        if self._module is None:
            return states
        logits: Tensor = self._module(states)
        if self._change is None or self._value is None:
            return logits
        return self._change(logits, self._value)

    def loss(self, states: Tensor, places: Tensor, targets: Tensor, divisor: float = 1) -> Tensor:
        """Sum the cross-entropies of targets (N,) after the positions `places` (N,) of the states
        (B, T, ...), counted through all rows; divide by `divisor`. In float32.
        """
        places, targets = (t.to(states.device, non_blocking=True) for t in (places, targets))
        rows = self._rows(states)
        flat = states.flatten(0, 1)
        return summed_loss(flat, places, targets, self.logits, rows=rows, divisor=divisor)

    def log_probs(self, states: Tensor, places: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens (N, C) after the positions `places` (N,) of the states
        (B, T, ...), and whether each is the likeliest token; both (N, C).
        """
        places, tokens = (t.to(states.device, non_blocking=True) for t in (places, tokens))
        rows = self._rows(states)
        return token_log_probs(states.flatten(0, 1), places, tokens, self.logits, rows=rows)

    def _rows(self, states: Tensor) -> int:
        vocabulary = states.shape[-1] if self._module is None else self._vocabulary
        return max(LEAST, CHUNK // vocabulary)


def in_table(model: nn.Module) -> bool:
    """Whether a model is a language model of the table of families, and of transformers' own class:
    one from elsewhere may do something else between its base and its logits.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is None or not family.placement.causal:
        return False
    is_transformers_class = type(model).__module__.startswith("transformers.")
    if not is_transformers_class or not isinstance(model, PreTrainedModel):
        return False
    return model.get_output_embeddings() is not None


def _why_whole(model: nn.Module, training: bool) -> str | None:
    """Why the logits of all positions are needed; None where they are not."""
    if not in_table(model):
        return f"{type(model).__name__} is not in the table of families"
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    if training and any(parameter.requires_grad for parameter in head.parameters()):
        return "the head is trained"
    return None
