"""How far apart two routings are: of two runs, or of two tasks.

The distance of two sites' shares p and q is the square root of their Jensen-Shannon divergence to
base 2: a metric, 0 for equal shares, 1 where no control is used by both.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.special import rel_entr

from moc_cli.errors import RunError
from moc_cli.inspection.statistics import share_rows
from moc_cli.methods.route_counts import Layout, Record


def distances(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon distance of each row of p and q (S, N): (S,), in [0, 1]."""
    middle = (p + q) / 2
    apart = (rel_entr(p, middle) + rel_entr(q, middle)).sum(-1) / (2 * np.log(2))
    return np.asarray(np.sqrt(np.clip(apart, 0, 1)))


def task_distances(tasks: Mapping[str, Record]) -> dict[str, Any]:
    """Mean distance over the sites between every two tasks; no matrix for fewer than two."""
    names = list(tasks)
    if len(names) < 2:
        return {"tasks": names, "matrix": []}
    shares = [share_rows(tasks[name]) for name in names]
    matrix = [[round(float(distances(p, q).mean()), 9) for q in shares] for p in shares]
    return {"tasks": names, "matrix": matrix}


def compared(name: str, record: Record, other_record: Record) -> dict[str, Any]:
    """Our shares minus those of the other run, and the distance of each site."""
    p, q = share_rows(record), share_rows(other_record)
    return {
        "run": name,
        "difference": (p - q).round(9).tolist(),
        "distance": distances(p, q).round(9).tolist(),
    }


def check_same_sites(layout: Layout, other_layout: Layout, name: str) -> None:
    """Raise RunError unless both runs have the same sites and pools."""
    if layout.names == other_layout.names and layout.pools == other_layout.pools:
        return
    if layout.names == other_layout.names:
        difference = f"pools {_pools(other_layout)}, this run {_pools(layout)}"
    else:
        difference = f"{_range(other_layout)}, this run {_range(layout)}"
    raise RunError(
        f"--compare: {name} has {difference}: their maps cannot be laid over each other",
        "compare runs of models with as many layers, with the same method.sites and share_gate",
    )


def _range(layout: Layout) -> str:
    return f"{len(layout.names)} sites ({layout.names[0]} to {layout.names[-1]})"


def _pools(layout: Layout) -> str:
    return " and ".join(layout.pools)
