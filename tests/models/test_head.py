"""A head apart from its base gives the model's own logits and gradients, for every family."""

import pytest
import torch
from support.models import DECODERS, make_batch, make_tiny, make_tiny_model, train_controls
from torch import nn
from torch.nn import functional as F

from moc_cli.kinds import Choice, Pairs
from moc_cli.kinds.loss import LanguageLoss
from moc_cli.methods import attach
from moc_cli.models import head as heads
from moc_cli.models.head import Head
from moc_cli.recipe.methods import (
    ControlMethod,
    DoraMethod,
    LoraMethod,
    MocMethod,
    MolexMethod,
)
from moc_cli.training.checks import logits_note

CPU = torch.device("cpu")
CAPPED = {"gemma3_text": {"final_logit_softcapping": 3.0}}
METHODS = {
    "moc": MocMethod(rank=4, top_k=2, gate={"projection_dim": 8}),
    "control": ControlMethod(rank=4),
    "lora": LoraMethod(rank=4, dropout=0.0),
    "dora": DoraMethod(rank=4, dropout=0.0),
    "molex": MolexMethod(rank=4, dropout=0.0, gate={"projection_dim": 8}),
}
CASES = [("moc", family) for family in DECODERS] + [(name, "gemma2") for name in METHODS]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK", 1)
    monkeypatch.setattr(heads, "LEAST", 3)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", DECODERS)
def test_logits_are_the_models(family: str, tied: bool) -> None:
    """Bit for bit, as training and as evaluation run it."""
    model = make_tiny(family, tie_word_embeddings=tied, **CAPPED.get(family, {}))
    head, batch = Head(model), make_batch(side="left")
    assert head.reason is None
    for mode in (True, False):
        model.train(mode)
        with torch.no_grad():
            states, _ = head.run(batch | {"use_cache": False})
            assert states.shape[-1] == model.config.get_text_config().hidden_size
            assert torch.equal(head.logits(states), model(**batch, use_cache=False).logits)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_gradients_are_those_of_all_logits(method: str, family: str) -> None:
    batch = make_batch(side="left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, ::3] = -100

    def gradients(whole: bool) -> tuple[float, dict[str, torch.Tensor]]:
        adapted = attach(make_tiny(family, **CAPPED.get(family, {})), METHODS[method], seed=1)
        named = adapted.named_trainables()
        train_controls(named)
        adapted.model.train()
        adapted.set_loss_scale(0.5)
        if whole:
            logits = adapted.model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
            loss = F.cross_entropy(logits.float(), labels[:, 1:].flatten(), reduction="sum")
            loss = loss / LanguageLoss.count_targets(labels)
        else:
            task = LanguageLoss(adapted.model, CPU)
            loss = task(batch | {"labels": labels}, LanguageLoss.count_targets(labels))
        loss.backward()
        return loss.item(), {name: p.grad for name, p in named.items() if p.grad is not None}

    (loss, found), (expected_loss, expected) = gradients(False), gradients(True)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = max(1e-3, gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale)


def test_a_trained_head_gets_its_gradient() -> None:
    """Then the logits are taken whole, and that is said."""
    batch = make_batch(side="left")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model = make_tiny("llama")
    adapted = attach(model, METHODS["moc"], new_modules=("lm_head",), seed=1)
    assert Head(model, training=True).reason == "the head is trained"
    assert Head(model).reason is None  # nothing is trained in an evaluation
    (note,) = logits_note(Choice(), model)
    assert note.endswith("which takes memory: the head is trained")
    assert logits_note(Pairs((), 2), model) == []
    LanguageLoss(model, CPU)(batch | {"labels": labels}, 1).backward()
    found = adapted.named_trainables()["modules.lm_head.weight"]
    gradient, found.grad = found.grad, None
    logits = model(**batch).logits[:, :-1].flatten(0, 1)
    F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").backward()
    assert gradient is not None
    torch.testing.assert_close(gradient, found.grad, rtol=1e-4, atol=1e-5)


def test_models_that_are_not_known_compute_their_logits_themselves() -> None:
    """OPT projects its states before the head; a class of another place may do anything."""

    class Own(type(make_tiny_model("llama"))):  # type: ignore[misc]
        pass

    llama = make_tiny_model("llama")
    llama.__class__ = Own
    for model in (make_tiny_model("opt"), llama, nn.Linear(2, 2)):
        head = Head(model)
        assert head.reason == f"{type(model).__name__} is not in the table of families"
    head, batch = Head(llama), make_batch()
    with torch.no_grad():
        states, _ = head.run(batch)
        assert torch.equal(head.logits(states), llama(**batch).logits)
        last, _ = head.run(batch, last=2)
    torch.testing.assert_close(last, states[:, -2:])
