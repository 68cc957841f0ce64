"""The balance loss is scaled as the task's loss is: by hand, by the Trainer, in peft, in molex."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import get_peft_model
from support.messages import refused
from support.models import make_batch, make_tiny, train_controls
from transformers import PreTrainedModel, Trainer, TrainingArguments

from moc_cli.api import attach
from moc_cli.errors import MocError
from moc_cli.models.hooks import FollowLoss
from moc_cli.nn.forward import Forward
from moc_cli.peft import MocConfig

GATE = {"projection_dim": 8}
METHODS: dict[str, dict[str, Any]] = {
    "moc": {"rank": 4, "gate": GATE, "balance": {"weight": 1.0}},
    "molex": {"rank": 2, "dropout": 0.0, "gate": GATE, "balance": {"weight": 1.0}},
}


def place(method: str, family: str = "llama") -> Any:
    controls = attach(make_tiny(family), method, seed=5, **METHODS[method])
    train_controls(controls.named_parameters())
    return controls


def gates(parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    return {
        name: value.grad.clone()
        for name, value in parameters.items()
        if "gates." in name and value.grad is not None
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_that_is_divided_divides_the_balance_loss(
    method: str, checkpointing: bool
) -> None:
    gradients = []
    for scale in (None, 0.25):
        controls = place(method)
        if scale is not None:
            controls.set_loss_scale(scale)
        if checkpointing:
            controls.model.gradient_checkpointing_enable()
        given = make_batch(4)
        loss = controls.model.train()(**given, labels=given["input_ids"]).loss
        (loss / 4).backward()
        gradients.append(gates(controls.named_parameters()))
    assert gradients[0]
    assert any(value.any() for value in gradients[0].values())
    for name, value in gradients[0].items():
        assert torch.equal(value, gradients[1][name]), name


def test_log_probabilities_in_place_of_a_loss_show_its_scale() -> None:
    """As TRL's trainer has it, which sums them itself: 3 of the 12 labels of a step are here."""
    mixture = SimpleNamespace(training=True, current=Forward(), loss_scale=None)
    log_probs = torch.zeros(2, 4, requires_grad=True)
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])

    class Fused(torch.nn.Module):
        def forward(self, labels: torch.Tensor) -> Any:
            own = (log_probs * mask).sum()  # the model's own loss, which nobody uses
            return SimpleNamespace(loss=own, log_probs=log_probs * mask, label_mask=mask)

    model = Fused()
    FollowLoss(mixture).register(model)
    (-model(labels=mask).log_probs.sum() / 12).backward()
    assert mixture.current.loss_scale.item() == pytest.approx(3 / 12)


def train(model: PreTrainedModel, copies: int, folder: Path, **more: Any) -> None:
    """One step of SGD over `copies` micro-batches with the same row."""
    row = make_batch(1)["input_ids"][0]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=copies,
        learning_rate=0.1,
        max_grad_norm=0.0,
        optim="sgd",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        **more,
    )
    rows = [{"input_ids": row, "labels": row}] * copies
    Trainer(model=model, args=arguments, train_dataset=rows).train()


@pytest.mark.parametrize("surface", ["attach", "peft"])
def test_the_trainer_may_accumulate(surface: str, tmp_path: Path) -> None:
    trained = []
    for copies in (1, 3):
        if surface == "attach":
            model = place("moc").model
        else:
            config = MocConfig(task_type="CAUSAL_LM", seed=5, **METHODS["moc"])
            model = get_peft_model(make_tiny("llama"), config)
        train(model, copies, tmp_path)
        trained.append({n: p.detach() for n, p in model.named_parameters() if ".gates." in n})
    assert trained[0]
    for name, value in trained[0].items():
        assert torch.allclose(value, trained[1][name], atol=1e-6), name


def test_a_loss_of_the_trainer_itself_is_refused_until_its_scale_is_said(tmp_path: Path) -> None:
    controls = place("moc")
    with refused(MocError):
        train(controls.model, 2, tmp_path, label_smoothing_factor=0.1)
    controls.set_loss_scale(0.5)
    train(controls.model, 2, tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_scaler_scales_the_balance_loss_too(method: str) -> None:
    """After unscaling the gates have the gradient that they have without a scaler."""
    gradients = []
    for scale in (1.0, 65536.0):
        controls = place(method)
        parameters = controls.named_parameters()
        optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        given = make_batch(4)
        loss = controls.model.train()(**given, labels=given["input_ids"]).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        gradients.append(gates(parameters))
    assert any(value.abs().max() > 1e-3 for value in gradients[0].values())
    for name, value in gradients[0].items():
        torch.testing.assert_close(value, gradients[1][name], rtol=1e-5, atol=1e-7)
