"""transformers' own activation checkpointing, which 5.17 calls by another name."""

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel, **kwargs: object) -> None:
    """Let each layer run again in the backward pass; `kwargs` are torch's."""
    options = kwargs or None
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
