"""A routing.json out of a seeded generator, of any size, for tests of what is drawn from it."""

from typing import Any

import numpy as np

TASKS = ["openbookqa", "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "arc_e", "arc_c"]
NASTY = "</script><b>$x_1$ & “naïve” 任务 " + "long " * 30


def routing_of(
    sites: int,
    tasks: list[str],
    *,
    top_k: int = 1,
    decisions: int = 20,
    split_pools: bool = False,
    seed: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """Return a routing.json (format 1) of `sites` sites, attention and FFN by turns.

    `decisions` are those of each task; `split_pools` gives each block type its own gate.
    """
    random = np.random.default_rng(seed)
    names = [f"{index // 2}.{('attn', 'ffn')[index % 2]}" for index in range(sites)]
    blocks = [name.partition(".")[2] for name in names]
    pools = blocks if split_pools else ["shared"] * sites
    allowed = np.array([[a == b for b in pools] for a in pools])
    liking = np.where(allowed, random.normal(size=(sites, sites)) * 2, -np.inf)
    found = {name: _choices(random, liking, top_k, decisions) for name in tasks}
    counts = sum(np.array(entry["counts"]) for entry in found.values())
    share = counts / counts.sum(axis=1, keepdims=True)
    use = [float(counts[:, i].sum() / counts[allowed[:, i]].sum()) for i in range(sites)]
    local = [float(share[index, index]) for index in range(sites)]
    history = [
        {"step": step, "use": random.dirichlet(np.ones(sites) * 0.2).tolist(), "local_share": 0.1}
        for step in range(10, 210, 10)
    ]
    apart = random.uniform(size=(len(tasks), len(tasks)))
    matrix = np.triu(apart, 1) + np.triu(apart, 1).T
    return {
        "format": 1,
        "run": "outputs/made",
        "model": "org/made-135m",
        "method": {"name": "moc", "rank": 16, "alpha": 0.95, "top_k": top_k},
        "step": 200,
        "split": "test",
        "limit": decisions,
        "text": None,
        "sites": [
            {"name": name, "layer": index // 2, "block": blocks[index], "pool": pools[index]}
            for index, name in enumerate(names)
        ],
        "decisions": decisions * len(tasks),
        "level": "sample",
        "share": share.tolist(),
        "counts": counts.tolist(),
        "weight": (share * 0.5).tolist(),
        "probability": (share * 0.25).tolist(),
        "tasks": found,
        "per_site": [
            {
                "name": names[index],
                "local_share": local[index],
                "gate_entropy": 1.0,
                "use_entropy": 0.5,
                "effective": 1.6487,
                "margin": 0.25,
                "one_token": None,
                "relative_size": 0.125,
                "top": names[int(share[index].argmax())],
            }
            for index in range(sites)
        ],
        "per_control": [
            {"name": name, "use": use[index], "dead": use[index] == 0, "norm": 0.5}
            for index, name in enumerate(names)
        ],
        "summary": {
            "local_share": float(np.mean(local)),
            "attn_to_ffn": 0.25,
            "ffn_to_attn": 0.75,
            "gate_entropy": 1.0,
            "use_entropy": 0.5,
            "margin": 0.25,
            "effective": 1.6487,
            "dead": [name for index, name in enumerate(names) if use[index] == 0],
            "chance_local": 1 / sites,
        },
        "history": history,
        "task_distance": {"tasks": tasks, "matrix": matrix.tolist()}
        if len(tasks) > 1
        else {"tasks": tasks, "matrix": []},
        "compare": None,
        "ablation": None,
        "tokens": None,
        "warnings": [],
    } | more


def _choices(
    random: np.random.Generator, liking: np.ndarray, top_k: int, decisions: int
) -> dict[str, Any]:
    """Return one task's entry: `decisions` draws of the top_k best liked, with a task's noise."""
    taste = liking + random.gumbel(size=liking.shape) * 1.5
    votes = taste + random.gumbel(size=(decisions, *liking.shape)) * 0.7
    chosen = votes.argsort(axis=-1)[..., -top_k:]
    counts = np.zeros(liking.shape, dtype=int)
    for row in chosen:
        np.put_along_axis(counts, row, np.take_along_axis(counts, row, -1) + 1, axis=-1)
    share = counts / (decisions * top_k)
    gate = np.exp(taste) / np.exp(taste).sum(axis=-1, keepdims=True)
    return {
        "decisions": decisions,
        "share": share.tolist(),
        "counts": counts.tolist(),
        "weight": share.tolist(),
        "probability": gate.tolist(),
    }


def compared(routing: dict[str, Any], seed: int = 1) -> dict[str, Any]:
    """Return the `compare` section against another generated run of the same shape."""
    size = len(routing["sites"])
    other = np.random.default_rng(seed).dirichlet(np.ones(size) * 0.1, size)
    difference = np.asarray(routing["share"]) - other
    distance = np.abs(difference).sum(axis=1) / 2
    run = "outputs/other"
    return {"run": run, "difference": difference.tolist(), "distance": distance.tolist()}


def ablated(routing: dict[str, Any], seed: int = 2) -> list[dict[str, Any]]:
    """Return an `ablation` section: one change of loss a site."""
    random = np.random.default_rng(seed)
    names = [site["name"] for site in routing["sites"]]
    changes = random.normal(0.01, 0.02, len(names))
    return [
        {"site": name, "loss_change": float(change), "stderr": 0.005}
        for name, change in zip(names, changes, strict=True)
    ]


def full_routing(sites: int = 24, top_k: int = 1, tasks: int = 2) -> dict[str, Any]:
    """Return a routing that has something for every figure."""
    routing = routing_of(sites, TASKS[:tasks], top_k=top_k)
    return routing | {"compare": compared(routing), "ablation": ablated(routing)}


def named(routing: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the routing with `name` where a user can put any letters."""
    tasks = {f"{key} {name}": entry for key, entry in routing["tasks"].items()}
    told = routing["task_distance"] and routing["task_distance"] | {"tasks": list(tasks)}
    compare = routing["compare"] and routing["compare"] | {"run": name}
    changed = {"tasks": tasks, "task_distance": told, "compare": compare, "run": name}
    return routing | changed | {"model": name, "text": None}
