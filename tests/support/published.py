"""The shapes of the paper's four decoders, on the meta device."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

_SEVEN = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_WIDE = _SEVEN | {"intermediate_size": 14336, "num_key_value_heads": 8}
_CONFIGS = {
    "LLaMA2-7B": (LlamaConfig, _SEVEN | {"vocab_size": 32000, "intermediate_size": 11008}),
    "LLaMA3-8B": (LlamaConfig, _WIDE | {"vocab_size": 128256}),
    "Mistral-7B": (MistralConfig, _WIDE | {"vocab_size": 32768}),
    "Qwen2.5-14B": (
        Qwen2Config,
        {
            "vocab_size": 152064,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 48,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
        },
    ),
}


def published(name: str) -> nn.Module:
    """The model of this name as shapes alone; embeddings and head are not tied."""
    config, values = _CONFIGS[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(**values, tie_word_embeddings=False))
