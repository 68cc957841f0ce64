"""What is probably wrong with a routing, and which key of the recipe changes it.

untrained_gate  nothing ever gave the gate a gradient: λ = 0, and the task gives none at K = 1
                with renormalised weights, nor at α = 1
collapsed       nearly all choices go to a few controls of the pool
local_only      nearly all sites choose their own control, so that layers exchange nothing
one_token       most choices would change without one token of many
uniform         the gate gives all controls nearly the same probability
half_dead       half of a pool's controls or more are never chosen

All but the first are about many decisions: of one text they are not given.
"""

import math
from collections.abc import Mapping
from typing import Any

from moc_cli.recipe.methods import MocMethod

COLLAPSED = 0.1  # effective number of controls, as a share of the pool's
LOCAL_ONLY = 0.9  # share of local choices
ONE_TOKEN = 0.5  # share of the decisions that one token turns
UNIFORM = 0.999  # entropy of the gate, as a share of the largest possible
DEAD = 0.5  # share of a pool's controls
ENOUGH = 5  # choices for each control, below which chance alone leaves controls unchosen

GateWarning = dict[str, str]


def find_warnings(routing: Mapping[str, Any], method: MocMethod) -> list[GateWarning]:
    """Return the warnings that a routing.json deserves, the most serious first."""
    pools: dict[str, list[int]] = {}
    for index, site in enumerate(routing["sites"]):
        pools.setdefault(site["pool"], []).append(index)
    untrained = _untrained(method)
    warnings = [untrained]
    if routing["text"] is None:
        sizes = [len(members) for members in pools.values()]
        for pool, members in pools.items():
            collapsed = _collapsed(routing, method, pool, members)
            warnings.append(collapsed or _half_dead(routing, method, pool, members))
        warnings += [
            None if untrained else _uniform(routing, method, sizes),
            _local_only(routing, method, sizes),
            _one_token(routing, method),
        ]
    return [warning for warning in warnings if warning is not None]


def _untrained(method: MocMethod) -> GateWarning | None:
    by_task = method.alpha != 1 and not (
        method.top_k == 1 and method.gate.estimator == "renormalized"
    )
    if method.balance.weight or by_task:
        return None
    if method.alpha == 1:
        reason = "alpha = 1 leaves no weight to routed controls"
        other = "method.alpha below 1"
    else:
        reason = "at top_k = 1 renormalised weights are always 1, so the task gives no gradient"
        other = "method.gate.estimator=straight_through"
    return {
        "name": "untrained_gate",
        "message": f"the gate was never trained: balance.weight is 0, and {reason}; its choices "
        f"come from its random start. Set method.balance.weight=0.01, or {other}",
        "key": "method.balance.weight",
    }


def _collapsed(
    routing: Mapping[str, Any], method: MocMethod, pool: str, members: list[int]
) -> GateWarning | None:
    use = [routing["per_control"][i]["use"] for i in members]
    effective = math.exp(-sum(share * math.log(share) for share in use if share > 0))
    fewest = method.top_k  # each decision takes so many different ones
    if len(members) <= 2 * fewest or effective > max(1.5 * fewest, COLLAPSED * len(members)):
        return None
    top = max(members, key=lambda i: routing["per_control"][i]["use"])
    name, share = routing["per_control"][top]["name"], routing["per_control"][top]["use"]
    return {
        "name": "collapsed",
        "message": f"the gate{_of_pool(pool)} has collapsed: {100 * share:.0f} % of the choices go "
        f"to {name}, and of {len(members)} controls {effective:.1f} are in effective use. "
        f"{_more_balance(method)}",
        "key": "method.balance.weight",
    }


def _half_dead(
    routing: Mapping[str, Any], method: MocMethod, pool: str, members: list[int]
) -> GateWarning | None:
    dead = sum(routing["per_control"][i]["dead"] for i in members)
    choices = routing["decisions"] * len(members) * method.top_k
    if dead < DEAD * len(members) or choices < ENOUGH * len(members):
        return None
    return {
        "name": "half_dead",
        "message": f"{dead} of {len(members)} controls{_of_pool(pool)} are dead: no site chooses "
        f"them. {_more_balance(method)}",
        "key": "method.balance.weight",
    }


def _of_pool(pool: str) -> str:
    return "" if pool == "shared" else f" of the {pool} pool"


def _more_balance(method: MocMethod) -> str:
    weight = method.balance.weight
    advice = f"{3 * weight:.2g}" if weight else "0.01"
    return f"Raise method.balance.weight, now {weight:g}, to {advice}"


def _uniform(routing: Mapping[str, Any], method: MocMethod, sizes: list[int]) -> GateWarning | None:
    allowed = [size - method.routing.exclude_local for size in sizes]  # controls of a decision
    if min(allowed) < 2:
        return None
    entropy, max_entropy = routing["summary"]["gate_entropy"], math.log(sum(allowed) / len(allowed))
    if entropy < UNIFORM * max_entropy:
        return None
    if method.alpha == 1:
        key = "method.alpha"
        advice = f"Set {key} below 1, so that the task trains the gate too"
    elif method.gate.estimator == "renormalized":
        key = "method.gate.estimator"
        advice = f"Set {key}=straight_through, so that the task trains the gate too"
    else:
        key, weight = "method.balance.weight", method.balance.weight
        advice = f"Lower {key}, now {weight:g}, to {weight / 3:.2g}"
    return {
        "name": "uniform",
        "message": f"the gate gives all controls nearly the same probability: its entropy is "
        f"{entropy:.4f} of at most {max_entropy:.4f}, and the chosen control leads by "
        f"{routing['summary']['margin']:.4f}: a small change of the input may "
        f"choose another one. {advice}",
        "key": key,
    }


def _local_only(
    routing: Mapping[str, Any], method: MocMethod, sizes: list[int]
) -> GateWarning | None:
    share = routing["summary"]["local_share"]
    if share < LOCAL_ONLY or min(sizes) <= method.top_k:
        return None
    return {
        "name": "local_only",
        "message": f"{100 * share:.0f} % of the choices are local: each block gets its own control "
        "twice, and layers exchange nothing. Set method.routing.exclude_local=true",
        "key": "method.routing.exclude_local",
    }


def _one_token(routing: Mapping[str, Any], method: MocMethod) -> GateWarning | None:
    shares = [site["one_token"] for site in routing["per_site"]]
    counted = [share for share in shares if share is not None]
    share = sum(counted) / len(counted) if counted else 0.0
    if share <= ONE_TOKEN:
        return None
    if method.routing.vote == "mean":
        advice = "Set method.routing.vote=mode, where every token counts the same"
    else:
        advice = "The tokens prefer different controls; set method.routing.vote=mean"
    return {
        "name": "one_token",
        "message": f"{100 * share:.0f} % of the choices are decided by one token: without it "
        f"another control would win. {advice}",
        "key": "method.routing.vote",
    }
