"""Mixture of Layer Experts in plain loops, over the layers of a bare model; no code of the product.

Each layer is called by itself with masks and positions made here. LoRA is written into the
weights as W + s·B A, so that gradients reach A and B.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.formulas import both_ways, causal, windows
from support.reference import gate_logits, softmax_without
from torch import Tensor, nn

FINAL_NORMS = ("norm", "final_layer_norm", "final_layernorm", "final_norm")
Call = Callable[[int, Tensor], Tensor]


@dataclass
class Reference:
    """What the loops give: last hidden states, each depth's choices, and each depth's L·P_j."""

    hidden: Tensor
    picks: list[list[int]]
    losses: list[Tensor]


def write_lora(model: nn.Module, parameters: dict[str, Tensor], scale: float) -> None:
    """Replace each target's weight by W + s·B A, a plain tensor with a graph."""
    for key, A in parameters.items():
        if key.endswith("lora_A.weight"):
            B = parameters[key.replace("lora_A", "lora_B")]
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            module = model.get_submodule(name)
            weight = module.weight.detach() + scale * B @ A
            del module.weight
            module.weight = weight


def mixture(
    model: nn.Module,
    ids: Tensor,
    mask: Tensor,
    gate: dict[str, Tensor],
    *,
    kind: str = "cosine",
    weight: Tensor | float = 0.95,
    voters: Tensor | None = None,
    by_row: bool = True,
) -> Reference:
    """h ← w·u_t(h) + (1−w)·u_j(h), j voted by each row's tokens or by the whole batch's."""
    base = model.base_model
    base = getattr(base, "language_model", base)
    h, call, layers = opened(base, ids, mask)
    voters = mask.bool() if voters is None else voters
    rows = range(len(ids))
    picks, losses = [], []
    for t in range(layers):
        p = {
            (b, i): softmax_without(gate_logits(h[b, i], gate, kind), None)
            for b in rows
            for i in range(h.shape[1])
            if voters[b, i]
        }
        whole = sum(p.values()) / len(p)
        chosen = []
        for b in rows:
            own = [value for (row, _), value in p.items() if row == b]
            mean = (sum(own) / len(own) if own else torch.zeros(layers)) if by_row else whole
            chosen.append(max(range(layers), key=lambda j, mean=mean: (mean[j].item(), -j)))
        losses.append(layers * whole[chosen[0]])
        picks.append(chosen)
        outputs = {j: call(j, h) for j in {t, *chosen}}
        h = torch.stack(
            [
                outputs[t][b]
                if chosen[b] == t
                else weight * outputs[t][b] + (1 - weight) * outputs[chosen[b]][b]
                for b in rows
            ]
        )
    for name in FINAL_NORMS:
        h = getattr(base, name, nn.Identity())(h)
    return Reference(h, picks, losses)


def opened(base: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Call, int]:
    """The first layer's input, a call of layer j, and how many layers there are."""
    kind = base.config.model_type
    if kind.startswith("deberta"):
        return _deberta(base, ids, mask)
    if kind == "modernbert":
        return _modernbert(base, ids, mask)
    if hasattr(base, "encoder") or hasattr(base, "transformer"):
        return _encoder(base, ids, mask)
    return _decoder(base, ids, mask)


def _additive(allowed: Tensor) -> Tensor:
    dtype = torch.get_default_dtype()
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def _decoder(base: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Call, int]:
    h = getattr(base.config, "embedding_multiplier", 1.0) * base.get_input_embeddings()(ids)
    positions = torch.arange(ids.shape[1])[None]
    masks = [_additive(causal(mask, window)) for window in windows(base.config)]
    by_type = base.config.model_type == "gemma3_text"

    def call(j: int, x: Tensor) -> Tensor:
        kind = (base.config.layer_types[j],) if by_type else ()
        turns = base.rotary_emb(x, positions, *kind)
        return base.layers[j](
            x, attention_mask=masks[j], position_embeddings=turns, position_ids=positions
        )

    return h, call, len(base.layers)


def _encoder(base: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Call, int]:
    h = base.embeddings(input_ids=ids)
    if hasattr(base, "embeddings_project"):
        h = base.embeddings_project(h)
    layers = base.encoder.layer if hasattr(base, "encoder") else base.transformer.layer
    allowed = _additive(both_ways(mask).expand(-1, -1, ids.shape[1], -1))

    def call(j: int, x: Tensor) -> Tensor:
        out = layers[j](x, allowed)
        return out[0] if isinstance(out, tuple) else out

    return h, call, len(layers)


def _deberta(base: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Call, int]:
    h = base.embeddings(input_ids=ids, mask=mask)
    pairs = (mask[:, None, :, None] * mask[:, None, None, :]).bool()
    positions, table = base.encoder.get_rel_pos(h), base.encoder.get_rel_embedding()

    def call(j: int, x: Tensor) -> Tensor:
        layer = base.encoder.layer[j]
        return layer(x, pairs, relative_pos=positions, rel_embeddings=table)[0]

    return h, call, len(base.encoder.layer)


def _modernbert(base: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Call, int]:
    h = base.embeddings(input_ids=ids)
    positions = torch.arange(ids.shape[1])[None]

    def call(j: int, x: Tensor) -> Tensor:
        kind = base.config.layer_types[j]
        reach = base.config.local_attention // 2 if kind == "sliding_attention" else None
        allowed = _additive(both_ways(mask, reach).expand(-1, -1, ids.shape[1], -1))
        turns = base.rotary_emb(x, positions, kind)
        return base.layers[j](x, attention_mask=allowed, position_embeddings=turns)

    return h, call, len(base.layers)
