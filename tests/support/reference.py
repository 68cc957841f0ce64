"""Mixture-of-Control in plain loops over tokens and controls: slow, float64, its own code only.

It follows the paper's formulas (eq. 9 and 10, the balance loss) and the readings that the
documentation names, and imports nothing from the product.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Settings:
    top_k: int = 1
    alpha: float = 0.95
    scale: float = 1.0
    kind: str = "cosine"
    level: str = "batch"
    vote: str = "mean"
    estimator: str = "renormalized"
    exclude_local: bool = False
    f: str = "top_k"


def gate_logits(x: Tensor, gate: dict[str, Tensor], kind: str) -> Tensor:
    """One token's logits over the pool: x (d,) -> (N,)."""
    if kind == "linear":
        return gate["weight"] @ x
    features = gate["projection"] @ x
    temperature = torch.exp(
        torch.minimum(gate["log_temperature"], torch.tensor(100.0, dtype=x.dtype).log())
    )
    logits = []
    for expert in gate["experts"]:
        lengths = (features * features).sum().sqrt() * (expert * expert).sum().sqrt()
        logits.append(temperature * (features * expert).sum() / lengths)
    return torch.stack(logits)


def softmax_without(logits: Tensor, excluded: int | None) -> Tensor:
    """exp/sum over the pool; an excluded control has probability 0."""
    keep = [j for j in range(len(logits)) if j != excluded]
    total = sum(torch.exp(logits[j] - logits.detach().max()) for j in keep)
    zero = torch.zeros((), dtype=logits.dtype)
    return torch.stack(
        [
            torch.exp(logits[j] - logits.detach().max()) / total if j != excluded else zero
            for j in range(len(logits))
        ]
    )


def best(values: list[tuple], k: int) -> list[int]:
    """The k largest by value, ties to the lower index."""
    return sorted(range(len(values)), key=lambda j: (*[-v for v in values[j]], j))[:k]


def choose(voters: list[Tensor], s: Settings) -> tuple[list[int], list[Tensor]]:
    """The controls that these voters choose, and their weights."""
    size = len(voters[0])
    mean = sum(voters) / len(voters)
    if s.vote == "mean":
        picks = best([(mean[j].item(),) for j in range(size)], s.top_k)
    else:
        counts = [0] * size
        for p in voters:
            for j in best([(p[j].item(),) for j in range(size)], s.top_k):
                counts[j] += 1
        picks = best([(counts[j], mean[j].item()) for j in range(size)], s.top_k)
    if s.estimator == "probability":
        return picks, [mean[j] for j in picks]
    total = sum(mean[j] for j in picks)
    weights = [mean[j] / total for j in picks]
    if s.estimator == "straight_through":
        weights = [
            w.detach() + mean[j] - mean[j].detach() for w, j in zip(weights, picks, strict=True)
        ]
    return picks, weights


def site_update(
    x: Tensor,
    valid: Tensor,
    controls: list[tuple[Tensor, Tensor]],
    local: int,
    gate: dict[str, Tensor],
    s: Settings,
) -> tuple[Tensor, list[list[int]], Tensor]:
    """One site: x (B, T, d), valid (B, T) -> its update, the picks of each decision, the loss."""
    rows, tokens, _ = x.shape
    excluded = local if s.exclude_local else None
    p = [
        [softmax_without(gate_logits(x[b, t], gate, s.kind), excluded) for t in range(tokens)]
        for b in range(rows)
    ]
    real = [[t for t in range(tokens) if valid[b, t]] for b in range(rows)]
    decisions: dict[tuple[int, int], tuple[list[int], list[Tensor]]] = {}
    if s.level == "batch":
        shared = choose([p[b][t] for b in range(rows) for t in real[b]], s)
    for b in range(rows):
        row = choose([p[b][t] for t in real[b]], s) if s.level == "sample" else None
        for t in range(tokens):
            if s.level == "batch":
                decisions[b, t] = shared
            elif s.level == "sample":
                decisions[b, t] = row
            else:
                decisions[b, t] = choose([p[b][t]], s)
    update = torch.zeros_like(x)
    out = []
    for b in range(rows):
        line = []
        for t in range(tokens):
            A, B = controls[local]
            state = x[b, t]
            total = s.alpha * (B @ (A @ state))
            picks, weights = decisions[b, t]
            routed = [(controls[k], weight) for k, weight in zip(picks, weights, strict=True)]
            for (A, B), weight in routed:
                total = total + (1 - s.alpha) * weight * (B @ (A @ state))
            line.append(s.scale * total)
        out.append(torch.stack(line))
    update = torch.stack(out)
    seen = {
        "batch": [decisions[0, 0][0]],
        "sample": [decisions[b, 0][0] for b in range(rows)],
        "token": [decisions[b, t][0] for b in range(rows) for t in range(tokens)],
    }[s.level]
    voters = [p[b][t] for b in range(rows) for t in real[b]]
    counted = {
        "batch": seen,
        "sample": [decisions[b, 0][0] for b in range(rows) if real[b]],
        "token": [decisions[b, t][0] for b in range(rows) for t in real[b]],
    }[s.level]
    return update, seen, balance(voters, counted, s, len(controls))


def balance(voters: list[Tensor], picks: list[list[int]], s: Settings, size: int) -> Tensor:
    """N · Σ_j f_j P_j over the valid tokens."""
    total = torch.zeros((), dtype=voters[0].dtype)
    for j in range(size):
        mean = sum(p[j] for p in voters) / len(voters)
        if s.f == "choice":
            share = sum(row.count(j) for row in picks) / (s.top_k * len(picks))
        else:
            hits = 0
            for p in voters:
                hits += j in best([(p[i].item(),) for i in range(size)], s.top_k)
            share = hits / (s.top_k * len(voters))
        total = total + share * mean
    return (size - s.exclude_local) * total
