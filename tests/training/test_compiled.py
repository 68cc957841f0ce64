"""Compiled layers: one graph for all layers of a kind, no graph break, the same gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import refused
from support.models import make_tiny_model, train_controls
from support.tiny_runs import choices_run
from support.tracing import traced
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from moc_cli.cli import run
from moc_cli.data.packing import pack
from moc_cli.errors import MocError
from moc_cli.kinds.choice import Choice
from moc_cli.kinds.loss import LanguageLoss
from moc_cli.methods import attach
from moc_cli.models.head import Head
from moc_cli.models.packing import attend_by_row
from moc_cli.recipe.methods import MocMethod
from moc_cli.training import loop
from moc_cli.training.compiled import compiled_layers
from moc_cli.training.recompute import recompute_layers

LENGTHS = (16, 11)


@pytest.fixture
def traced_layers() -> Iterator[None]:
    with traced():
        yield


def test_gradients_are_equal_and_few_graphs_serve_all_lengths(traced_layers: None) -> None:
    """One graph for a layer whose input needs no gradient, the others for all other layers; the
    backward pass computes layers again with the same ones.
    """
    model = make_tiny_model("llama", num_hidden_layers=3).train()
    adapted = attach(model, MocMethod(rank=4), seed=1)
    adapted.set_loss_scale(0.5)
    train_controls(adapted.named_trainables())
    recompute_layers(model, "full")
    head = Head(model, training=True)

    def gradients(tokens: int) -> dict[str, Tensor]:
        ids = torch.randint(5, 200, (3, tokens), generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        head.run(given)[0].square().mean().backward()
        result = {name: p.grad.clone() for name, p in adapted.named_trainables().items()}
        model.zero_grad()
        return result

    expected = [gradients(tokens) for tokens in LENGTHS]
    with compiled_layers(model, True):
        found = [gradients(tokens) for tokens in LENGTHS]
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 3
    for ours, eager in zip(found, expected, strict=True):
        for name, value in eager.items():
            assert torch.allclose(ours[name], value, rtol=1e-5, atol=1e-8), name
    counters.clear()
    gradients(12)
    assert not counters["stats"], "the layers are compiled no more"


@pytest.mark.parametrize(("mode", "around"), [("selective", False), ("full", True)])
def test_a_compiled_layer_is_selective_by_itself(mode: str, around: bool) -> None:
    model = make_tiny_model("llama")
    recompute_layers(model, mode)
    layer = model.model.layers[0]
    before = layer._gradient_checkpointing_func
    with compiled_layers(model, True):
        assert layer.gradient_checkpointing == around
        assert (layer._compiled_call_impl is None) == around
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func is before


def test_packed_rows_of_other_lengths_take_the_same_graphs(traced_layers: None) -> None:
    model = make_tiny_model("llama", num_hidden_layers=2).train()
    attend_by_row(model)
    adapted = attach(model, MocMethod(rank=4, sites="attn"), seed=1)
    adapted.set_loss_scale(0.5)
    train_controls(adapted.named_trainables())
    loss = LanguageLoss(model, torch.device("cpu"))

    def gradients(*lengths: int) -> dict[str, Tensor]:
        rows = [{"input_ids": [7 + n % 5] * n, "labels": [7] * n} for n in lengths]
        loss(pack(rows), 1).backward()
        result = {name: p.grad.clone() for name, p in adapted.named_trainables().items()}
        model.zero_grad()
        return result

    batches = ((5, 9, 3), (2, 4))
    expected = [gradients(*lengths) for lengths in batches]
    with compiled_layers(model, True):
        found = [gradients(*lengths) for lengths in batches]
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 3
    for ours, eager in zip(found, expected, strict=True):
        for name, value in eager.items():
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-6), name


def test_a_layer_that_cannot_be_compiled_is_one_sentence() -> None:
    with (
        refused(MocError),
        compiled_layers(torch.nn.Identity(), True),
    ):
        raise TorchDynamoException("\nthe compiler was stopped\nmore")


@pytest.mark.parametrize("wanted", [False, True])
def test_a_run_compiles_and_multiplies_as_its_recipe_says(
    wanted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are compiled around the steps, evaluations are eager, and TF32 is for GPUs."""
    entered: list[bool] = []
    precisions: list[str] = []
    stances: list[str] = []

    @contextmanager
    def compiled_around(model: torch.nn.Module, asked: bool) -> Iterator[None]:
        entered.append(asked)
        yield

    watch = Choice.watch

    def watched(self: Choice, *args: Any) -> Any:
        stances.append(torch._dynamo.eval_frame._stance.stance)
        return watch(self, *args)

    monkeypatch.setattr(loop, "compiled_layers", compiled_around)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(Choice, "watch", watched)
    keys = [f"train.torch_compile={str(wanted).lower()}", "train.max_steps=1"]
    keys += ["eval.eval_strategy=epoch", "eval.before=false"]
    changes = [text for key in keys for text in ("--set", key)]
    assert run([*choices_run(tmp_path), *changes]) == 0
    assert (entered, precisions, stances) == ([wanted], ["highest"], ["force_eager"])
