"""A tiny random model of every family in the table, in float32 or, for exact laws, in float64."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from support.models import VOCABULARY
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

WIDTH = 32
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_GROUPED = {"num_key_value_heads": 2}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
_GEMMA = _GROUPED | _MIXED | {"head_dim": 8, "query_pre_attn_scalar": 24}
_GEMMA2 = _GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
_DEBERTA = {
    "relative_attention": True,
    "max_relative_positions": 16,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
# What each family needs beside the common shape. Windows are shorter than the tests' rows, grouped
# keys and partial rotations are on where the family has them.
_CHANGES: dict[str, dict] = {
    "llama": _GROUPED,
    "mistral": _GROUPED | {"sliding_window": 4, "head_dim": 8},
    "qwen2": _GROUPED | _MIXED | {"use_sliding_window": True},
    "qwen3": _GROUPED | _MIXED | {"use_sliding_window": True, "head_dim": 8},
    "granite": _GROUPED
    | {
        "embedding_multiplier": 2.0,
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.22,
        "logits_scaling": 0.5,
    },
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA,
    "gemma3": {},
    "phi3": _GROUPED | {"sliding_window": 4, "partial_rotary_factor": 0.5},
    "olmo2": _GROUPED,
    "gpt_neox": {"use_parallel_residual": True, "rotary_pct": 0.5},
    "bert": {},
    "roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "xlm-roberta": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "camembert": {"max_position_embeddings": 514, "type_vocab_size": 1},
    "electra": {"embedding_size": 16},
    "deberta": _DEBERTA,
    "deberta-v2": _DEBERTA
    | {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    "distilbert": {"hidden_dim": 64},
    "modernbert": {
        "layer_types": ["sliding_attention", "full_attention"],
        "local_attention": 4,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
}
FAMILIES = tuple(_CHANGES)
DECODERS = FAMILIES[: FAMILIES.index("bert")]
ENCODERS = FAMILIES[len(DECODERS) :]
# Not in the table: a recipe may place controls in them all the same.
_UNKNOWN: dict[str, dict] = {"gpt2": {"n_inner": 64}, "opt": {"ffn_dim": 64}}


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    """A two-layer configuration of `family`, of hidden size 32."""
    if family == "gemma3":
        text = _SHAPE | _CHANGES["gemma3_text"] | changes
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=_VISION)
    return AutoConfig.for_model(family, **_SHAPE | (_CHANGES | _UNKNOWN)[family] | changes)


def make_tiny(
    family: str,
    *,
    seed: int = 0,
    num_labels: int = 3,
    dtype: torch.dtype = torch.float32,
    **changes: object,
) -> PreTrainedModel:
    """A tiny language model (decoders) or classifier (encoders), without dropout, in eval mode.

    Norms and biases, which start as ones and zeros, are random too, and so is the padding's
    embedding: padding that took part in anything would show.
    """
    auto = AutoModelForSequenceClassification if family in ENCODERS else AutoModelForCausalLM
    config = tiny_config(family, **changes)
    if family in ENCODERS:
        config.num_labels = num_labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
            words = model.get_input_embeddings().weight
            words[config.get_text_config().pad_token_id] = words.std() * torch.randn_like(words[0])
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


LENGTHS = (9, 7, 5, 3, 2, 1, 2, 1)


def make_batch(rows: int = 8, side: str = "right") -> dict[str, torch.Tensor]:
    """Rows of 9 to 1 tokens: the short ones take routes of their own."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, 250, (rows, max(LENGTHS)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS[:rows]):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def train_controls(parameters: dict[str, torch.nn.Parameter], seed: int = 5) -> None:
    """Draw non-zero B and make the gate sharp, so that rows take different routes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(".B"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("log_temperature"):
                parameter.fill_(4.0)


class _Widen(TorchFunctionMode):
    """Every request for float32 is answered in float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


@contextmanager
def all_float64() -> Iterator[None]:
    """Within it models are built and run in float64 throughout.

    Models compute norms, rotations and softmax in float32 whatever their weights' type; two equal
    formulas would then agree to 1e-7 only.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(before)
