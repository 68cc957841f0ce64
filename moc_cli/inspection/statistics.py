"""From the sums of a record to the matrices and numbers of routing.json.

Matrices are S × S: row = site, column = control, both in the order of the sites; a site's row is 0
outside its pool. Entropies are in nats.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moc_cli.methods.route_counts import Record
from moc_cli.nn.control import Control
from moc_cli.nn.mixture import Mixture


def matrices(record: Record) -> dict[str, Any]:
    """Return share, counts, weight, probability (S, S) and the decisions of a site."""
    layout, sums = record.layout, record.sums
    size = len(layout.names)
    share, weight, probability = np.zeros((3, size, size))
    counts = np.zeros((size, size), dtype=int)
    for site in range(size):
        members, decisions = layout.members(site), max(record.decisions(site), 1)
        counts[site, members] = sums.counts[site].round()
        share[site, members] = sums.counts[site] / (decisions * layout.top_k)
        weight[site, members] = sums.weights[site] / decisions
        probability[site, members] = sums.probabilities[site] / decisions
    return {
        "decisions": round(record.decisions(0)),
        "counts": counts.tolist(),
        "share": share.round(9).tolist(),
        "weight": weight.round(9).tolist(),
        "probability": probability.round(9).tolist(),
    }


def share_rows(record: Record) -> np.ndarray:
    """The shares (S, S) of a record, in float64."""
    return np.array(matrices(record)["share"])


def sites(mixture: Mixture) -> list[dict[str, Any]]:
    """Name every site: its layer, its block and its pool."""
    return [
        {"name": site.name, "layer": site.layer, "block": site.block, "pool": site.pool}
        for site in mixture.sites
    ]


def per_site(record: Record, level: str) -> list[dict[str, Any]]:
    """Return each site's numbers; `one_token` is null where every token decides for itself."""
    layout, sums, rows = record.layout, record.sums, []
    for site, name in enumerate(layout.names):
        members, counts = layout.members(site), sums.counts[site]
        decisions, counted_rows = max(record.decisions(site), 1), max(sums.rows[site].item(), 1)
        share = counts / counts.sum().clamp(min=1)
        entropy = _entropy(share)
        alone = None if level == "token" else sums.one_token[site].item() / decisions
        rows.append(
            {
                "name": name,
                "local_share": share[members.index(site)].item(),
                "gate_entropy": sums.entropy[site].item() / decisions,
                "use_entropy": entropy,
                "effective": math.exp(entropy),
                "margin": sums.margin[site].item() / decisions,
                "one_token": alone,
                "relative_size": sums.relative_size[site].item() / counted_rows,
                "top": layout.names[members[int(counts.argmax())]],
            }
        )
    return rows


def per_control(record: Record, mixture: Mixture, scale: float) -> list[dict[str, Any]]:
    """Return each control's share of its pool's choices, and its norm ‖B A‖·scale.

    `scale` is the method's: what a family's multiplier takes from an update, the mixture gives
    back before, so that it is in neither.
    """
    use = record.use()["use"]
    return [
        {
            "name": name,
            "use": use[index],
            "dead": use[index] == 0,
            "norm": scale * control_norm(mixture.control(index)),
        }
        for index, name in enumerate(record.layout.names)
    ]


@torch.no_grad()
def control_norm(control: Control) -> float:
    """Frobenius norm of B A, as √tr(BᵀB · AAᵀ): two (r, r) products instead of a (d, d) one."""
    a, b = control.A.double(), control.B.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def summary(record: Record, mixture: Mixture) -> dict[str, Any]:
    """Return the numbers of the whole model: means over pools, or shares of all choices."""
    layout, use = record.layout, record.use()
    pools = layout.pools.items()
    entropies = [
        _entropy(torch.tensor([use["use"][i] for i in members], dtype=torch.float64))
        for _, members in pools
    ]
    decisions = [record.decisions(site) for site in range(len(layout.names))]
    gate, lead = record.sums.entropy.sum().item(), record.sums.margin.sum().item()
    excluded = mixture.routing.exclude_local
    chance = [0.0 if excluded else 1 / len(members) for _, members in pools]
    return {
        "local_share": use["local_share"],
        "attn_to_ffn": _across(record, mixture, "attn", "ffn"),
        "ffn_to_attn": _across(record, mixture, "ffn", "attn"),
        "gate_entropy": gate / max(sum(decisions), 1),
        "use_entropy": sum(entropies) / len(entropies),
        "margin": lead / max(sum(decisions), 1),
        "effective": sum(map(math.exp, entropies)) / len(entropies),
        "dead": [name for name, u in zip(layout.names, use["use"], strict=True) if u == 0],
        "chance_local": sum(chance) / len(chance),
    }


def _across(record: Record, mixture: Mixture, block: str, other_block: str) -> float | None:
    """Of the choices that `block` sites made, the share that went to `other_block` controls."""
    total = across = 0.0
    for site in mixture.sites:
        members = record.layout.members(site.index)
        in_other_block = [mixture.sites[m].block == other_block for m in members]
        if site.block == block and any(in_other_block):
            counts = record.sums.counts[site.index]
            total += counts.sum().item()
            across += counts[torch.tensor(in_other_block)].sum().item()
    return across / total if total else None


def _entropy(share: Tensor) -> float:
    return float(-torch.special.xlogy(share, share).sum()) + 0.0
