"""Compiled layers: one graph for all layers of a kind, no graph break, the same gradients."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_tiny_model
from support.tiny_runs import choices_run
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.kinds.choice import Choice
from moc_cli.methods import attach
from moc_cli.recipe.methods import MocMethod
from moc_cli.training import compiled, loop
from moc_cli.training.compiled import compiled_layers

CASES: list[tuple[str, Any]] = [
    ("llama", MocMethod(rank=4)),
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_gradients_are_equal_and_no_graph_breaks(
    family: str, method: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # What inductor makes of a graph is not ours to test, and is slow.
    eager = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", eager)
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda self: setattr(self, "_compiled_call_impl", eager(self._call_impl)),
    )
    monkeypatch.setattr(logging.root.manager, "disable", logging.DEBUG)  # dynamo traces a lot
    request.addfinalizer(torch._dynamo.reset)  # it holds the model, and what hangs on it
    torch._dynamo.reset()
    counters.clear()
    model = make_tiny_model(
        family, num_labels=2 if family == "bert" else None, num_hidden_layers=3
    ).train()
    adapted = attach(model, method, seed=1)
    for name, parameter in adapted.named_trainables().items():
        if name.endswith(".B"):
            torch.nn.init.normal_(parameter, std=0.1)

    def gradients(tokens: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        ids = torch.randint(5, 200, (3, tokens))
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        model(input_ids=ids, attention_mask=mask).logits.square().mean().backward()
        named = adapted.named_trainables().items()
        result = {name: p.grad.clone() for name, p in named if p.grad is not None}
        model.zero_grad()
        return result

    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = [gradients(tokens) for tokens in (16,)]
    with compiled_layers(model, True):
        found = [gradients(tokens) for tokens in (16,)]
    assert not counters["graph_break"]
    assert 0 < counters["stats"]["unique_graphs"] <= 4  # not one for each layer
    for ours, eager in zip(found, expected, strict=True):
        for name, value in eager.items():
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-7), name
    counters.clear()
    gradients(12)
    assert not counters["stats"], "the layers are compiled no more"


def test_what_is_needed_is_said_before_weights_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiled, "has_triton", lambda: False)

    class Wanted:
        class train:  # noqa: N801
            torch_compile = True

    for device, missing in (("cpu", "a C++ compiler"), ("cuda", "the package triton")):
        (problem,) = compiled.compile_problems(Wanted, torch.device(device))  # type: ignore[arg-type]
        assert missing in problem


def test_a_layer_that_cannot_be_compiled_is_one_sentence() -> None:
    with (
        pytest.raises(MocError, match="a layer could not be compiled: the compiler was stopped"),
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
