"""Activations that are recomputed: the same gradients, less memory, nothing differentiated."""

from functools import cache
from typing import Any

import pytest
import torch
from support.messages import refused
from support.models import ENCODERS, FAMILIES, make_batch, make_tiny, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moc_cli.errors import MocError
from moc_cli.kinds.loss import LanguageLoss
from moc_cli.methods import Adapted, attach
from moc_cli.models.lean import keep_less
from moc_cli.planning.fake_device import META
from moc_cli.planning.live_memory import highest
from moc_cli.planning.replay import StepMeasurement, replay
from moc_cli.recipe.methods import ControlMethod, DoraMethod, LoraMethod, MocMethod, MolexMethod
from moc_cli.recipe.sections import TrainSection
from moc_cli.training.loop_types import Settings
from moc_cli.training.recompute import check_recompute, recompute_layers

MODES = ("selective", "full", "offload")
_LOW_RANK: dict[str, Any] = {"rank": 4, "alpha": 8, "dropout": 0.0}
METHODS: dict[str, Any] = {
    "moc": MocMethod(rank=4, top_k=2, gate={"projection_dim": 8}),
    "moc-rows": MocMethod(rank=4, routing={"level": "sample"}, gate={"kind": "linear"}),
    "control": ControlMethod(rank=4),
    "lora": LoraMethod(**_LOW_RANK),
    "dora": DoraMethod(**_LOW_RANK),
    "molex": MolexMethod(**_LOW_RANK, gate={"projection_dim": 8}),
}
KINDS = ("llama", "gemma3", "bert")
# Which layers are recomputed is the family's, what they hold is the method's.
ALL = [("moc", family) for family in FAMILIES]
ALL += [(method, family) for method in METHODS for family in KINDS if method != "moc"]


def gradients(adapted: Adapted, batch: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    adapted.model.zero_grad()
    adapted.set_loss_scale(1.0)
    adapted.model(**batch, labels=labels).loss.backward()
    return {n: p.grad.clone() for n, p in adapted.named_trainables().items() if p.grad is not None}


@pytest.mark.parametrize(("method", "family"), ALL)
def test_gradients_are_the_same_to_the_last_bit(method: str, family: str) -> None:
    adapted = attach(make_tiny(family), METHODS[method])
    with torch.no_grad():
        for name, parameter in adapted.named_trainables().items():
            if name.endswith(("B", "lora_B.weight")):
                parameter.add_(0.1)
    keep_less(adapted.model)
    adapted.model.train()
    batch = make_batch()
    labels = torch.arange(8) % 3 if family in ENCODERS else batch["input_ids"]
    expected = gradients(adapted, batch, labels)
    assert any(gradient.any() for gradient in expected.values())
    for mode in MODES:
        recompute_layers(adapted.model, mode)
        found = gradients(adapted, batch, labels)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), (mode, name)
        assert not adapted.model.get_input_embeddings()(batch["input_ids"]).requires_grad


def shapes() -> PreTrainedModel:
    with META:
        config = tiny_config("llama", num_hidden_layers=6, intermediate_size=128)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@cache
def step(mode: str) -> StepMeasurement:
    adapted = attach(shapes(), METHODS["control"])
    recompute_layers(adapted.model, mode)
    ids = torch.full((16, 128), 7)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return replay(adapted, batch, LanguageLoss, Settings())


def test_each_mode_takes_less_memory_than_the_one_before() -> None:
    steps = [step(mode).phases.values() for mode in ("none", *MODES)]
    taken = [highest(phases)["activations"] for phases in steps]
    assert taken == sorted(taken, reverse=True)
    assert len(set(taken)) == len(taken)
    a_layer_input = 16 * 128 * 32 * 2
    assert taken[2] - taken[3] >= 4 * a_layer_input


def test_the_host_does_not_wait_for_what_it_holds() -> None:
    assert step("offload").fake.syncs.total() == step("none").fake.syncs.total()


def test_a_model_that_cannot_is_named_before_its_weights() -> None:
    model = shapes()
    model.supports_gradient_checkpointing = False
    check_recompute(model, "none")
    with refused(MocError):
        check_recompute(model, "selective")


def test_the_other_name_stands_for_full() -> None:
    assert TrainSection().activation_checkpointing == "none"
    for given in ({"gradient_checkpointing": True}, {"activation_checkpointing": "full"}):
        assert TrainSection.model_validate(given).activation_checkpointing == "full"
    both = {"gradient_checkpointing": False, "activation_checkpointing": "offload"}
    assert TrainSection.model_validate(both).activation_checkpointing == "offload"
