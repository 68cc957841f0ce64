"""Tiny random models and tokenizers that tests share."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
MERGES = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ġ", "t")]
VOCABULARY = 256 + len(SPECIAL_TOKENS) + len(MERGES)
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_PAIR = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    """A two-layer configuration of `llama`, `bert` or `roberta`, of hidden size 32."""
    shape: dict = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "llama":
        return LlamaConfig(**shape | {"num_key_value_heads": 2} | changes)
    if family == "bert":
        return BertConfig(**shape | changes)
    return RobertaConfig(**shape | {"max_position_embeddings": 514, "type_vocab_size": 1} | changes)


def make_tiny_model(
    family: str, *, seed: int = 0, num_labels: int | None = None, **changes: object
) -> PreTrainedModel:
    """A tiny random model; with `num_labels` a classifier, otherwise a language model.

    Weights are drawn wider than transformers does, so that outputs are far from uniform.
    """
    config = tiny_config(family, initializer_range=0.2, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if num_labels is None:
            model = AutoModelForCausalLM.from_config(config)
        else:
            config.num_labels = num_labels
            model = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


def _byte_level() -> Tokenizer:
    """One token a byte, but spaces merge with spaces and with a following t.

    As in real vocabularies, the tokens of a prompt that ends in spaces are then not a prefix of the
    tokens of prompt and answer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in MERGES)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for tiny decoders; adds no special tokens by itself."""
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level(), **_SPECIAL)


def make_pair_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for tiny encoders: `<s> a </s>` and `<s> a </s> b </s>`, typed."""
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **_PAIR,
    )
