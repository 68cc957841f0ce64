"""Planted gates: each fault is told by its own warning and by no other; a healthy gate by none."""

from collections.abc import Callable

import pytest
import torch
from support.models import make_tiny
from torch import Tensor, nn

from moc_cli.inspection import statistics
from moc_cli.inspection.warnings import find_warnings
from moc_cli.methods import attach
from moc_cli.nn.gate import Gate
from moc_cli.recipe.methods import MocMethod

LAYERS = 5
SIZE = 2 * LAYERS
Rule = Callable[[int, int, int], tuple[int, float]]  # site, row, token -> its control, how surely


class Planted(Gate):
    """A gate that follows a rule: every control's logit is 0 but for the rule's."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.calls = 0

    def features(self, x: Tensor) -> Tensor:
        site, self.calls = self.calls % SIZE, self.calls + 1
        logits = torch.zeros(*x.shape[:2], SIZE)
        for row in range(x.shape[0]):
            for token in range(x.shape[1]):
                control, strength = self.rule(site, row, token)
                logits[row, token, control] = strength
        return logits


def routing_of(rule: Rule, **section) -> tuple[dict, MocMethod]:
    method = MocMethod.model_validate({"rank": 4, "gate": {"projection_dim": 8}} | section)
    adapted = attach(make_tiny("llama", num_hidden_layers=LAYERS), method)
    adapted.mixture.gates["shared"] = Planted(rule)
    with torch.no_grad(), adapted.recorder() as recorder:
        ids = torch.randint(5, 250, (8, 12))
        adapted.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    record, mixture = recorder.record(), adapted.mixture
    return {
        "text": None,
        "decisions": 8,
        "sites": statistics.sites(mixture),
        "per_site": statistics.per_site(record, "sample"),
        "per_control": statistics.per_control(record, mixture, mixture.scale),
        "summary": statistics.summary(record, mixture),
    }, method


def healthy(site: int, row: int, token: int) -> tuple[int, float]:
    """Rows differ, and most of a row's tokens agree."""
    return (3 * site + row + (token % 4 == 0)) % SIZE, 2.0


def collapsed(site: int, row: int, token: int) -> tuple[int, float]:
    return (3 if (site, row) != (4, 4) else 7), 2.0


def local(site: int, row: int, token: int) -> tuple[int, float]:
    return site, 2.0


def one_token(site: int, row: int, token: int) -> tuple[int, float]:
    """The first token is sure; the others hardly care, and want something else."""
    return ((site + row) % SIZE, 5.0) if token == 0 else ((site + row + 1) % SIZE, 0.1)


def uniform(site: int, row: int, token: int) -> tuple[int, float]:
    return (3 * site + row) % SIZE, 0.001


def half_dead(site: int, row: int, token: int) -> tuple[int, float]:
    return 2 * ((site + row) % (SIZE // 2)), 2.0


@pytest.mark.parametrize(
    ("rule", "section", "name", "key"),
    [
        (healthy, {}, None, None),
        (healthy, {"alpha": 1.0}, None, None),
        (healthy, {"balance": {"weight": 0.0}, "top_k": 2}, None, None),
        (
            healthy,
            {"balance": {"weight": 0.0}, "gate": {"estimator": "straight_through"}},
            None,
            None,
        ),
        (collapsed, {}, "collapsed", "method.balance.weight"),
        (healthy, {"balance": {"weight": 0.0}}, "untrained_gate", "method.balance.weight"),
        (
            healthy,
            {"balance": {"weight": 0.0}, "alpha": 1.0, "gate": {"estimator": "probability"}},
            "untrained_gate",
            "method.balance.weight",
        ),
        (local, {}, "local_only", "method.routing.exclude_local"),
        (one_token, {}, "one_token", "method.routing.vote"),
        (uniform, {}, "uniform", "method.gate.estimator"),
        (
            uniform,
            {"gate": {"estimator": "straight_through"}},
            "uniform",
            "method.balance.weight",
        ),
        (uniform, {"routing": {"exclude_local": True}}, "uniform", "method.gate.estimator"),
        (uniform, {"alpha": 1.0}, "uniform", "method.alpha"),
        (half_dead, {}, "half_dead", "method.balance.weight"),
    ],
)
def test_each_fault_has_its_own_warning(rule, section, name, key):
    routing, method = routing_of(rule, **section)
    found = find_warnings(routing, method)
    assert [warning["name"] for warning in found] == ([] if name is None else [name])
    for warning in found:
        assert warning["key"] == key
        assert key in warning["message"]
        assert method.alpha != 1 or "estimator" not in warning["message"]
    of_a_text = [warning["name"] for warning in find_warnings(routing | {"text": "Hi."}, method)]
    assert of_a_text == [name for name in [name] if name == "untrained_gate"]


def test_the_keys_named_are_keys_of_the_recipe():
    for rule, section in (
        (collapsed, {}),
        (healthy, {"balance": {"weight": 0.0}}),
        (local, {}),
        (one_token, {}),
        (uniform, {}),
    ):
        routing, method = routing_of(rule, **section)
        for warning in find_warnings(routing, method):
            place = MocMethod.model_json_schema()
            for part in warning["key"].split(".")[1:]:
                found = place["properties"][part]
                reference = found.get("$ref") or found.get("allOf", [{}])[0].get("$ref")
                if reference:
                    place = MocMethod.model_json_schema()["$defs"][reference.split("/")[-1]]


def test_a_gate_at_lambda_0_gets_no_gradient_and_another_does():
    """What the warning says is so: the gate's gradient is exactly 0, and with a fix it is not."""
    for section, moved in (
        ({"balance": {"weight": 0.0}}, False),
        ({"balance": {"weight": 0.01}}, True),
        ({"balance": {"weight": 0.0}, "gate": {"estimator": "straight_through"}}, True),
    ):
        method = MocMethod.model_validate({"rank": 4} | section)
        adapted = attach(make_tiny("llama"), method)
        named = adapted.named_trainables()
        for name, parameter in named.items():
            if name.endswith(".B"):
                nn.init.normal_(parameter)
        ids = torch.randint(5, 250, (4, 9))
        adapted.model.train()(input_ids=ids).logits.square().mean().backward()
        gate = [p.grad for name, p in named.items() if name.startswith("gates.")]
        assert any(bool(grad.any()) for grad in gate) is moved
