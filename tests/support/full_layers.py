"""Every family's layers in full, with eq. 9 in its place: written from the formulas, without hooks.

Parameters are read from a bare model; the table of families and the product's code are not used.
Where a block reads x_t and where its control is added stands in each function below, in the open.
DeBERTa's own attention (`attention.self`) and the encoders' embeddings are called, not rewritten.
"""

from collections.abc import Callable

import torch
from support.formulas import (
    Weights,
    attend,
    both_ways,
    causal,
    gelu,
    gelu_tanh,
    rotate,
    rotate_pairs,
    silu,
    split,
    windows,
)
from support.reference import Settings, site_update
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig


class Sites:
    """What eq. 9 adds at (layer, block) for x_t (B, T, d); notes the choices it makes."""

    def __init__(
        self,
        controls: list[tuple[Tensor, Tensor]],
        gate: dict[str, Tensor],
        settings: Settings,
        voters: Tensor,
    ) -> None:
        self.controls = controls
        self.gate = gate
        self.settings = settings
        self.voters = voters
        self.picks: list[list[list[int]]] = []

    def __call__(self, layer: int, block: str, x: Tensor) -> Tensor:
        local = 2 * layer + (block == "ffn")
        update, picks, _ = site_update(
            x, self.voters, self.controls, local, self.gate, self.settings
        )
        self.picks.append(picks)
        return update


def llama(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """Pre-norm: both sites read the sum before the norm. Also mistral, qwen2, qwen3, qwen3_moe,
    smollm3, granite.

    In granite every block's output is multiplied, but not what eq. 9 adds to it.
    """
    config, w = base.config, Weights(base)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    own = getattr(config, "residual_multiplier", 1.0)
    scale = getattr(config, "attention_multiplier", size**-0.5)
    x = getattr(config, "embedding_multiplier", 1.0) * F.embedding(ids, w["embed_tokens.weight"])
    for n, window in enumerate(windows(config)):
        at = f"layers.{n}"
        h = w.rms_norm(f"{at}.input_layernorm", x, eps)
        q, k, v = (split(w.linear(f"{at}.self_attn.{c}_proj", h), size) for c in "qkv")
        if config.model_type.startswith("qwen3"):
            q = w.rms_norm(f"{at}.self_attn.q_norm", q, eps)
            k = w.rms_norm(f"{at}.self_attn.k_norm", k, eps)
        if getattr(config, "no_rope_layers", [True] * (n + 1))[n]:
            q, k = rotate(q, theta, size), rotate(k, theta, size)
        f = w.linear(f"{at}.self_attn.o_proj", attend(q, k, v, causal(mask, window), scale))
        x = x + own * f + add(n, "attn", x)
        h = w.rms_norm(f"{at}.post_attention_layernorm", x, eps)
        if config.model_type == "qwen3_moe":
            f = _experts(w, f"{at}.mlp", h, config.num_experts_per_tok)
        else:
            f = _swiglu(w, f"{at}.mlp", h)
        x = x + own * f + add(n, "ffn", x)
    return w.rms_norm("norm", x, eps)


def _swiglu(w: Weights, at: str, h: Tensor) -> Tensor:
    h = silu(w.linear(f"{at}.gate_proj", h)) * w.linear(f"{at}.up_proj", h)
    return w.linear(f"{at}.down_proj", h)


def _experts(w: Weights, at: str, h: Tensor, top_k: int) -> Tensor:
    """All experts on all tokens; the `top_k` likeliest of each token count, with the sum 1."""
    shares = F.linear(h, w[f"{at}.gate.weight"]).softmax(-1)
    shares = shares.where(shares >= shares.topk(top_k, dim=-1).values[..., -1:], 0.0)
    shares = shares / shares.sum(-1, keepdim=True)
    gate, up = torch.einsum("btd,eid->btei", h, w[f"{at}.experts.gate_up_proj"]).chunk(2, dim=-1)
    outputs = torch.einsum("btei,edi->bted", silu(gate) * up, w[f"{at}.experts.down_proj"])
    return (shares.unsqueeze(-1) * outputs).sum(2)


def cohere(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """One norm for both blocks; both sites from the layer's input."""
    config, w = base.config, Weights(base)
    size, eps = config.hidden_size // config.num_attention_heads, config.layer_norm_eps
    theta = config.rope_parameters["rope_theta"]
    x = F.embedding(ids, w["embed_tokens.weight"])
    for n in range(config.num_hidden_layers):
        at = f"layers.{n}"
        h = w.layer_norm(f"{at}.input_layernorm", x, eps)
        q, k, v = (split(w.linear(f"{at}.self_attn.{c}_proj", h), size) for c in "qkv")
        q, k = rotate_pairs(q, theta), rotate_pairs(k, theta)
        f = w.linear(f"{at}.self_attn.o_proj", attend(q, k, v, causal(mask), size**-0.5))
        f = f + _swiglu(w, f"{at}.mlp", h)
        x = x + f + add(n, "attn", x) + add(n, "ffn", x)
    return w.layer_norm("norm", x, eps)


def _rotation(config: PreTrainedConfig) -> tuple[int, float, int]:
    """The size of a head, theta, and how many of a head's first dimensions are turned."""
    size, rope = config.hidden_size // config.num_attention_heads, config.rope_parameters
    return size, rope["rope_theta"], int(size * rope["partial_rotary_factor"])


def phi(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """As cohere; `keep` is what the dropout after both blocks leaves of them."""
    config, w = base.config, Weights(base)
    (size, theta, turned), eps = _rotation(config), config.layer_norm_eps
    x = F.embedding(ids, w["embed_tokens.weight"])
    for n in range(config.num_hidden_layers):
        at = f"layers.{n}"
        h = w.layer_norm(f"{at}.input_layernorm", x, eps)
        q, k, v = (split(w.linear(f"{at}.self_attn.{c}_proj", h), size) for c in "qkv")
        q, k = rotate(q, theta, turned), rotate(k, theta, turned)
        f = w.linear(f"{at}.self_attn.dense", attend(q, k, v, causal(mask), size**-0.5))
        f = f + w.linear(f"{at}.mlp.fc2", gelu_tanh(w.linear(f"{at}.mlp.fc1", h)))
        x = x + keep * f + add(n, "attn", x) + add(n, "ffn", x)
    return w.layer_norm("final_layernorm", x, eps)


def phi3(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """Pre-norm, fused projections; `keep` is what the dropout after each block leaves of it."""
    config, w = base.config, Weights(base)
    (size, theta, turned), eps = _rotation(config), config.rms_norm_eps
    widths = [size * config.num_attention_heads, *[size * config.num_key_value_heads] * 2]
    x = F.embedding(ids, w["embed_tokens.weight"])
    for n, window in enumerate(windows(config)):
        at = f"layers.{n}"
        h = w.rms_norm(f"{at}.input_layernorm", x, eps)
        parts = w.linear(f"{at}.self_attn.qkv_proj", h).split(widths, dim=-1)
        q, k, v = (split(part, size) for part in parts)
        q, k = rotate(q, theta, turned), rotate(k, theta, turned)
        f = w.linear(f"{at}.self_attn.o_proj", attend(q, k, v, causal(mask, window), size**-0.5))
        x = x + keep * f + add(n, "attn", x)
        h = w.rms_norm(f"{at}.post_attention_layernorm", x, eps)
        gate, up = w.linear(f"{at}.mlp.gate_up_proj", h).chunk(2, dim=-1)
        x = x + keep * w.linear(f"{at}.mlp.down_proj", silu(gate) * up) + add(n, "ffn", x)
    return w.rms_norm("norm", x, eps)


def gemma(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """A norm before and one after each block; the control is outside both. gemma2 and gemma3."""
    if hasattr(base, "language_model"):
        base = base.language_model
    config, w, third = base.config, Weights(base), base.config.model_type == "gemma3_text"
    size, eps, scale = config.head_dim, config.rms_norm_eps, config.query_pre_attn_scalar**-0.5
    x = F.embedding(ids, w["embed_tokens.weight"]) * config.hidden_size**0.5
    for n, window in enumerate(windows(config)):
        at, rope = f"layers.{n}", config.rope_parameters
        theta = (rope[config.layer_types[n]] if third else rope)["rope_theta"]
        h = w.rms_norm(f"{at}.input_layernorm", x, eps, True)
        q, k, v = (split(w.linear(f"{at}.self_attn.{c}_proj", h), size) for c in "qkv")
        if third:
            q = w.rms_norm(f"{at}.self_attn.q_norm", q, eps, True)
            k = w.rms_norm(f"{at}.self_attn.k_norm", k, eps, True)
        q, k = rotate(q, theta, size), rotate(k, theta, size)
        f = attend(q, k, v, causal(mask, window), scale, config.attn_logit_softcapping)
        f = w.linear(f"{at}.self_attn.o_proj", f)
        x = x + w.rms_norm(f"{at}.post_attention_layernorm", f, eps, True) + add(n, "attn", x)
        h = w.rms_norm(f"{at}.pre_feedforward_layernorm", x, eps, True)
        h = gelu_tanh(w.linear(f"{at}.mlp.gate_proj", h)) * w.linear(f"{at}.mlp.up_proj", h)
        f = w.linear(f"{at}.mlp.down_proj", h)
        x = x + w.rms_norm(f"{at}.post_feedforward_layernorm", f, eps, True) + add(n, "ffn", x)
    return w.rms_norm("norm", x, eps, True)


def olmo2(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """No norm before a block, one after it; the control is outside it."""
    config, w = base.config, Weights(base)
    size = config.hidden_size // config.num_attention_heads
    theta, eps = config.rope_parameters["rope_theta"], config.rms_norm_eps
    x = F.embedding(ids, w["embed_tokens.weight"])
    for n in range(config.num_hidden_layers):
        at = f"layers.{n}"
        q, k, v = (w.linear(f"{at}.self_attn.{c}_proj", x) for c in "qkv")
        q = split(w.rms_norm(f"{at}.self_attn.q_norm", q, eps), size)
        k = split(w.rms_norm(f"{at}.self_attn.k_norm", k, eps), size)
        q, k = rotate(q, theta, size), rotate(k, theta, size)
        f = attend(q, k, split(v, size), causal(mask), size**-0.5)
        f = w.linear(f"{at}.self_attn.o_proj", f)
        x = x + w.rms_norm(f"{at}.post_attention_layernorm", f, eps) + add(n, "attn", x)
        h = silu(w.linear(f"{at}.mlp.gate_proj", x)) * w.linear(f"{at}.mlp.up_proj", x)
        f = w.linear(f"{at}.mlp.down_proj", h)
        x = x + w.rms_norm(f"{at}.post_feedforward_layernorm", f, eps) + add(n, "ffn", x)
    return w.rms_norm("norm", x, eps)


def gpt_neox(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """Both blocks and both sites from the layer's input, or one after the other."""
    config, w = base.config, Weights(base)
    (size, theta, turned), eps = _rotation(config), config.layer_norm_eps
    x = F.embedding(ids, w["embed_in.weight"])
    for n in range(config.num_hidden_layers):
        at = f"layers.{n}"
        h = w.layer_norm(f"{at}.input_layernorm", x, eps)
        # Each head's query, key and value stand side by side.
        q, k, v = split(w.linear(f"{at}.attention.query_key_value", h), 3 * size).chunk(3, dim=-1)
        q, k = rotate(q, theta, turned), rotate(k, theta, turned)
        f = w.linear(f"{at}.attention.dense", attend(q, k, v, causal(mask), size**-0.5))
        after = x + keep * f + add(n, "attn", x)
        seen = x if config.use_parallel_residual else after
        h = w.layer_norm(f"{at}.post_attention_layernorm", seen, eps)
        f = w.linear(f"{at}.mlp.dense_4h_to_h", gelu(w.linear(f"{at}.mlp.dense_h_to_4h", h)))
        x = after + keep * f + add(n, "ffn", seen)
    return w.layer_norm("final_layer_norm", x, eps)


def gpt2(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """Pre-norm, learned positions, weights stored the other way round; not in the table."""
    config, w = base.config, Weights(base)
    size, eps = config.hidden_size // config.num_attention_heads, config.layer_norm_epsilon

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    x = F.embedding(ids, w["wte.weight"]) + w["wpe.weight"][: ids.shape[1]]
    for n in range(config.num_hidden_layers):
        h = w.layer_norm(f"h.{n}.ln_1", x, eps)
        q, k, v = (split(part, size) for part in linear(f"h.{n}.attn.c_attn", h).chunk(3, dim=-1))
        f = linear(f"h.{n}.attn.c_proj", attend(q, k, v, causal(mask), size**-0.5))
        x = x + f + add(n, "attn", x)
        h = gelu_tanh(linear(f"h.{n}.mlp.c_fc", w.layer_norm(f"h.{n}.ln_2", x, eps)))
        x = x + linear(f"h.{n}.mlp.c_proj", h) + add(n, "ffn", x)
    return w.layer_norm("ln_f", x, eps)


def opt(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """Pre-norm, learned positions of real tokens; not in the table."""
    config, w = base.config, Weights(base.decoder)
    size, eps = config.hidden_size // config.num_attention_heads, 1e-5
    positions = mask.cumsum(1) * mask + 1
    x = F.embedding(ids, w["embed_tokens.weight"])
    x = x + F.embedding(positions, w["embed_positions.weight"])
    for n in range(config.num_hidden_layers):
        at = f"layers.{n}"
        h = w.layer_norm(f"{at}.self_attn_layer_norm", x, eps)
        q, k, v = (split(w.linear(f"{at}.self_attn.{c}_proj", h), size) for c in "qkv")
        f = attend(q, k, v, causal(mask), size**-0.5)
        x = x + w.linear(f"{at}.self_attn.out_proj", f) + add(n, "attn", x)
        h = w.linear(f"{at}.fc1", w.layer_norm(f"{at}.final_layer_norm", x, eps)).relu()
        x = x + w.linear(f"{at}.fc2", h) + add(n, "ffn", x)
    return w.layer_norm("final_layer_norm", x, eps)


def _bert_attention(base: nn.Module, w: Weights, mask: Tensor) -> Callable[[int, Tensor], Tensor]:
    size = base.config.hidden_size // base.config.num_attention_heads

    def attention(n: int, x: Tensor) -> Tensor:
        at = f"encoder.layer.{n}.attention.self"
        q, k, v = (split(w.linear(f"{at}.{c}", x), size) for c in ("query", "key", "value"))
        return attend(q, k, v, both_ways(mask), size**-0.5)

    return attention


def _deberta_attention(base: nn.Module, x: Tensor, mask: Tensor) -> Callable[[int, Tensor], Tensor]:
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    positions = base.encoder.get_rel_pos(x)
    table = base.encoder.get_rel_embedding()

    def attention(n: int, x: Tensor) -> Tensor:
        own = base.encoder.layer[n].attention.self
        return own(x, pairs, relative_pos=positions, rel_embeddings=table)[0]

    return attention


def bert(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """Post-norm: a site reads its block's input, and is added after its block's LayerNorm.

    Also roberta, xlm-roberta, camembert, electra, deberta and deberta-v2.
    """
    config, w = base.config, Weights(base)
    eps, deberta = config.layer_norm_eps, config.model_type.startswith("deberta")
    x = base.embeddings(input_ids=ids, **({"mask": mask} if deberta else {}))
    if config.model_type == "electra":
        x = w.linear("embeddings_project", x)
    attention = _deberta_attention(base, x, mask) if deberta else _bert_attention(base, w, mask)
    for n in range(config.num_hidden_layers):
        at = f"encoder.layer.{n}"
        f = w.linear(f"{at}.attention.output.dense", attention(n, x))
        x = w.layer_norm(f"{at}.attention.output.LayerNorm", x + f, eps) + add(n, "attn", x)
        f = w.linear(f"{at}.output.dense", gelu(w.linear(f"{at}.intermediate.dense", x)))
        x = w.layer_norm(f"{at}.output.LayerNorm", x + f, eps) + add(n, "ffn", x)
    return x


def distilbert(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """Post-norm, under other names."""
    config, w = base.config, Weights(base)
    size, eps = config.hidden_size // config.num_attention_heads, 1e-12
    x = base.embeddings(input_ids=ids)
    for n in range(config.num_hidden_layers):
        at = f"transformer.layer.{n}"
        q, k, v = (split(w.linear(f"{at}.attention.{c}_lin", x), size) for c in "qkv")
        f = attend(q, k, v, both_ways(mask), size**-0.5)
        f = w.linear(f"{at}.attention.out_lin", f)
        x = w.layer_norm(f"{at}.sa_layer_norm", x + f, eps) + add(n, "attn", x)
        f = w.linear(f"{at}.ffn.lin2", gelu(w.linear(f"{at}.ffn.lin1", x)))
        x = w.layer_norm(f"{at}.output_layer_norm", x + f, eps) + add(n, "ffn", x)
    return x


def modernbert(base: nn.Module, ids: Tensor, mask: Tensor, add: Sites, keep: float = 1.0) -> Tensor:
    """Pre-norm, but for the first layer's attention, whose input the embeddings have normed."""
    config, w = base.config, Weights(base)
    size, eps = config.hidden_size // config.num_attention_heads, config.norm_eps
    x = base.embeddings(input_ids=ids)
    for n, kind in enumerate(config.layer_types):
        at = f"layers.{n}"
        theta = config.rope_parameters[kind]["rope_theta"]
        reach = config.local_attention // 2 if kind == "sliding_attention" else None
        h = x if n == 0 else w.layer_norm(f"{at}.attn_norm", x, eps)
        q, k, v = (split(part, size) for part in w.linear(f"{at}.attn.Wqkv", h).chunk(3, dim=-1))
        q, k = rotate(q, theta, size), rotate(k, theta, size)
        f = w.linear(f"{at}.attn.Wo", attend(q, k, v, both_ways(mask, reach), size**-0.5))
        x = x + f + add(n, "attn", x)
        value, gate = w.linear(f"{at}.mlp.Wi", w.layer_norm(f"{at}.mlp_norm", x, eps)).chunk(2, -1)
        x = x + w.linear(f"{at}.mlp.Wo", gelu(value) * gate) + add(n, "ffn", x)
    return w.layer_norm("final_norm", x, eps)


FULL: dict[str, Callable[..., Tensor]] = {
    "llama": llama,
    "mistral": llama,
    "qwen2": llama,
    "qwen3": llama,
    "qwen3_moe": llama,
    "smollm3": llama,
    "granite": llama,
    "gemma2": gemma,
    "gemma3_text": gemma,
    "gemma3": gemma,
    "phi": phi,
    "phi3": phi3,
    "olmo2": olmo2,
    "gpt_neox": gpt_neox,
    "cohere": cohere,
    "gpt2": gpt2,
    "opt": opt,
    "bert": bert,
    "roberta": bert,
    "xlm-roberta": bert,
    "camembert": bert,
    "electra": bert,
    "deberta": bert,
    "deberta-v2": bert,
    "distilbert": distilbert,
    "modernbert": modernbert,
}


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """The language model's head on its last hidden states."""
    head = model.get_output_embeddings()
    scores = F.linear(hidden, head.weight, head.bias)
    scores = scores / getattr(model.config, "logits_scaling", 1.0)
    scores = scores * getattr(model.config, "logit_scale", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return scores if cap is None else cap * (scores / cap).tanh()
