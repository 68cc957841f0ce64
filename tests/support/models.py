"""Tiny random models of every family in the table, tokenizers for them, and rows to run."""

import copy
import io
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import torch
from support.machine import seed_torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from moc_cli.models.families import FAMILIES as TABLE

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
MERGES = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ġ", "t")]
VOCABULARY = 256 + len(SPECIAL_TOKENS) + len(MERGES)
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_PAIR = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}

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
    "qwen3_moe": _GROUPED
    | {
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "experts_implementation": "eager",  # the others know no float64
    },
    "smollm3": _GROUPED | {"no_rope_layer_interval": 2},
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
    "phi": _GROUPED | {"partial_rotary_factor": 0.5},
    "phi3": _GROUPED | {"sliding_window": 4, "partial_rotary_factor": 0.5},
    "olmo2": _GROUPED,
    "gpt_neox": {"use_parallel_residual": True, "rotary_pct": 0.5},
    "cohere": _GROUPED | {"logit_scale": 0.25},
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
DECODERS = tuple(family for family in FAMILIES if TABLE[family].placement.causal)
ENCODERS = tuple(family for family in FAMILIES if family not in DECODERS)
# One decoder of each kind: one cache for all layers, windows, two types of layers (of masks; of
# positions too), fused projections, the cache under another name.
KINDS_OF_DECODERS = ("llama", "mistral", "gemma2", "gemma3_text", "phi3", "gpt_neox")
# Not in the table: a recipe may place controls in them all the same.
_UNKNOWN: dict[str, dict] = {"gpt2": {"n_inner": 64}, "opt": {"ffn_dim": 64}}


class _Frozen(pickle.Pickler):
    """A model as bytes, and its tensors: a copy of it takes a third of the time of deepcopy."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[int, torch.Tensor] = {}
        self.dump(model)

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        self.tensors[id(value)] = value
        return id(value)

    def copy(self) -> PreTrainedModel:
        unpickler = pickle.Unpickler(io.BytesIO(self.bytes.getvalue()))
        unpickler.persistent_load = copy.deepcopy(self.tensors).__getitem__
        return unpickler.load()


_BUILT: dict[str, _Frozen] = {}


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    """A two-layer configuration of `family`, of hidden size 32."""
    if family == "gemma3":
        text = _SHAPE | _CHANGES["gemma3_text"] | changes
        return AutoConfig.for_model("gemma3", text_config=text, vision_config=_VISION)
    return AutoConfig.for_model(family, **_SHAPE | (_CHANGES | _UNKNOWN)[family] | changes)


def make_tiny_model(
    family: str,
    *,
    seed: int = 0,
    num_labels: int | None = None,
    dtype: torch.dtype = torch.float32,
    perturbed: bool = False,
    **changes: object,
) -> PreTrainedModel:
    """A tiny random model; with `num_labels` a classifier, otherwise a language model.

    Weights are drawn wider than transformers does, so that outputs are far from uniform. Norms and
    biases start as ones and zeros; `perturbed` makes them random too, and the padding's embedding.
    A model is built once: what is returned is a copy, which takes a sixth of the time.
    """
    asked = (family, seed, num_labels, dtype, perturbed, sorted(changes.items()))
    key = repr((*asked, torch.get_default_dtype(), torch.get_default_device()))
    if key not in _BUILT:
        config = tiny_config(family, **changes)
        auto = AutoModelForCausalLM
        if num_labels is not None:
            auto, config.num_labels = AutoModelForSequenceClassification, num_labels
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed)
            # As models are loaded: transformers 5.17 would leave the cap out.
            capped = getattr(config, "attn_logit_softcapping", None) is not None
            options = {"attn_implementation": "eager"} if capped else {}
            model = auto.from_config(config, dtype=dtype, **options)
            if perturbed:
                _perturb(model)
        _BUILT[key] = _Frozen(model.eval())
    return _BUILT[key].copy()


@torch.no_grad()
def _perturb(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    words = model.get_input_embeddings().weight
    words[model.config.get_text_config().pad_token_id] = words.std() * torch.randn_like(words[0])


def make_tiny(family: str, *, num_labels: int = 3, **options: object) -> PreTrainedModel:
    """A language model (decoders) or a classifier (encoders) for exact laws, without dropout.

    No parameter has its start value: padding that took part in anything would show.
    """
    labels = num_labels if family in ENCODERS else None
    model = make_tiny_model(family, num_labels=labels, perturbed=True, **options)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


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
    """Draw non-zero B, and make the gate sharp, so that rows take different routes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith(".B"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            elif name.endswith("log_temperature"):
                parameter.fill_(4.0)


def has_hooks(model: torch.nn.Module) -> bool:
    """Whether any module has a hook on its forward; a hook's handle shows those beside it."""
    for module in model.modules():
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: None)
            hooks = handle.hooks_dict_ref()
            handle.remove()
            if hooks:
                return True
    return False


@contextmanager
def all_float64() -> Iterator[None]:
    """Within it models are built and run in float64 throughout.

    Models compute norms, rotations and softmax in float32 whatever their weights' type; two equal
    formulas would then agree to 1e-7 only. So what they ask for by the name of float32 is float64.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with (
            mock.patch.multiple(torch, float32=torch.float64, float=torch.float64),
            mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
        ):
            yield
    finally:
        torch.set_default_dtype(before)


def _byte_level(phrases: Sequence[str] = ()) -> Tokenizer:
    """One token a byte, but spaces merge with spaces and with a following t.

    As in real vocabularies, the tokens of a prompt that ends in spaces are then not a prefix of the
    tokens of prompt and answer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the last ones are no ASCII bytes
    kept = alphabet[: len(alphabet) - len(phrases)]
    words = [*SPECIAL_TOKENS, *kept, *phrases, *("".join(pair) for pair in MERGES)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_byte_tokenizer(phrases: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for tiny decoders; adds no special tokens by itself.

    Each of `phrases` is one token. They take the places of bytes that ASCII text does not have.
    """
    tokenizer = _byte_level(phrases)
    tokenizer.add_tokens(list(phrases))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)


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
