"""Rows laid end to end: the loss, gradients, routes and counts of the same rows with padding."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.messages import refused
from support.models import (
    DECODERS,
    ENCODERS,
    make_byte_tokenizer,
    make_tiny,
    make_tiny_model,
    train_controls,
)
from support.toy import Plan, ToyAdapted, toy_collate, toy_fit, toy_rows

from moc_cli.cli import run
from moc_cli.data.batches import collate
from moc_cli.data.encode import IGNORED, Row
from moc_cli.data.packing import pack
from moc_cli.errors import MocError
from moc_cli.kinds.loss import LanguageLoss
from moc_cli.methods import Adapted, attach
from moc_cli.models import packing
from moc_cli.models.packing import attend_by_row, check_packing
from moc_cli.nn.packed import PackedRows
from moc_cli.recipe.methods import ControlMethod, DoraMethod, LoraMethod, MocMethod
from moc_cli.training.loop_types import Data, Settings

CPU = torch.device("cpu")
LENGTHS = (9, 5, 1, 7, 12)
GATE = {"projection_dim": 8}
METHODS = {
    "moc": MocMethod(rank=4, top_k=2, gate=GATE),
    "sample": MocMethod(rank=4, top_k=2, gate=GATE, routing={"level": "sample"}),
    "mode": MocMethod(rank=4, gate=GATE, routing={"level": "sample", "vote": "mode"}),
    "token": MocMethod(rank=4, gate=GATE, routing={"level": "token"}),
    "control": ControlMethod(rank=4),
    "lora": LoraMethod(rank=4, dropout=0.0),
    "dora": DoraMethod(rank=4, dropout=0.0),
}
CASES = [
    *((name, family) for family in DECODERS for name in ("moc", "sample")),
    *((name, "llama") for name in METHODS if name not in ("moc", "sample")),
]


def make_rows() -> list[Row]:
    """Rows whose prompts are not learned; the last token is the padding token too."""
    generator = torch.Generator().manual_seed(7)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(5, 250, (length,), generator=generator).tolist()
        ids[-1] = 0
        prompt = max(1, length // 3)
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    return rows


def make(name: str, family: str, by_row: bool = True) -> Adapted:
    model = make_tiny(family)
    if by_row:
        attend_by_row(model)
    adapted = attach(model, METHODS[name], seed=1)
    train_controls(adapted.named_trainables())
    adapted.model.train()
    adapted.set_loss_scale(0.5)
    return adapted


def step(adapted: Adapted, packed: bool) -> tuple[float, float | None, dict[str, torch.Tensor]]:
    """The loss, the balance loss and the gradients of one batch."""
    rows = make_rows()
    padded = collate(rows, make_byte_tokenizer(), side="left")
    batch = pack(rows) if packed else padded
    targets = LanguageLoss.count_targets(padded["labels"])
    assert LanguageLoss.count_targets(batch["labels"]) == targets
    named = adapted.named_trainables()
    for parameter in named.values():
        parameter.grad = None
    loss = LanguageLoss(adapted.model, CPU)(batch, targets)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    return loss.item(), adapted.balance_loss(), gradients


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(("name", "family"), CASES)
def test_packed_equals_padded(name: str, family: str, by_row: bool) -> None:
    """A family whose tokens see the row before them fails here, in any attention code."""
    adapted = make(name, family, by_row)
    loss, balance, gradients = step(adapted, packed=True)
    routes = adapted.routes()
    expected_loss, expected_balance, expected = step(adapted, packed=False)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert balance == (None if expected_balance is None else pytest.approx(expected_balance, 1e-5))
    assert gradients.keys() == expected.keys()
    for key, gradient in expected.items():
        scale = max(1e-2, gradient.abs().max().item())
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=2e-5 * scale)
    if name != "token":  # whose padding has routes too
        assert {key: ids.tolist() for key, ids in routes.items()} == {
            key: ids.tolist() for key, ids in adapted.routes().items()
        }


@pytest.mark.parametrize("family", sorted({*DECODERS} - {"gemma2"}))  # which knows no sdpa
def test_attention_takes_each_row_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a forward of padded rows, as an evaluation makes, stays what it is."""
    seen: list[int] = []
    real = packing.sdpa_attention_forward

    def spy(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.shape[2])
        return real(module, query, *args, **kwargs)

    monkeypatch.setattr(packing, "sdpa_attention_forward", spy)
    adapted = make("control", family)
    step(adapted, packed=True)
    assert seen == [*LENGTHS] * 2  # layers
    seen.clear()
    step(adapted, packed=False)
    assert seen == [max(LENGTHS)] * 2


def test_rows_of_the_sample_level_take_several_routes() -> None:
    adapted = make("sample", "llama")
    step(adapted, packed=True)
    assert any(len(ids.unique(dim=0)) > 1 for ids in adapted.routes().values())


def test_positions_alone_tell_packed_rows_too() -> None:
    """As other trainers give them; an evaluation routes each row alone as well."""
    batch = pack(make_rows())
    del batch["labels"]
    for name, training in (("sample", True), ("moc", False)):
        adapted = make(name, "llama")
        adapted.model.train(training)
        with torch.no_grad():
            packed = adapted.model(**batch, use_cache=False).logits[0]
            rows = [torch.tensor([row["input_ids"]]) for row in make_rows()]
            alone = [adapted.model(ids, torch.ones_like(ids)).logits[0] for ids in rows]
        torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-4, atol=1e-4)


def test_no_row_teaches_the_first_token_of_the_next() -> None:
    batch = pack([{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}])
    assert batch["labels"].tolist() == [[IGNORED, 6, IGNORED]]
    assert batch["position_ids"].tolist() == [[0, 1, 0]]


def test_rows_are_split_and_joined() -> None:
    x = torch.randn(1, sum(LENGTHS), 3)
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    rows = PackedRows.of(bounds, max(LENGTHS), sum(LENGTHS))
    apart = rows.split(x)
    assert apart.shape == (len(LENGTHS), max(LENGTHS), 3)
    assert rows.valid.sum(1).tolist() == list(LENGTHS)
    for row, part, length in zip(x[0].split(LENGTHS), apart, LENGTHS, strict=True):
        assert torch.equal(part[:length], row)
    assert torch.equal(rows.join(apart), x)


@pytest.mark.parametrize("family", ["gpt2", "opt", *ENCODERS])
def test_models_that_do_not_keep_rows_apart_are_refused_by_name(family: str) -> None:
    model = make_tiny(family) if family in ENCODERS else make_tiny_model(family)
    with refused(MocError, known="(?<=that do: ).* llama, .*"):
        check_packing(model)


def toy(packing: bool) -> Data:
    rows = toy_rows(8)

    def make_batch(numbers: list[int]) -> dict[str, torch.Tensor]:
        chosen = [rows[number] for number in numbers]
        return pack(chosen) if packing else toy_collate(rows, numbers)

    return Data(Plan([[0, 1, 2], [3, 4, 5], [6, 7]], shuffled=True), make_batch)


def test_counts_of_tokens_and_positions_are_true(tmp_path: Path) -> None:
    settings = Settings(seed=3, learning_rate=0.05, num_train_epochs=2, logging_steps=1)
    padded, packed = (
        toy_fit(tmp_path / str(packing), ToyAdapted(), toy(packing), settings)
        for packing in (False, True)
    )
    assert packed.counters.tokens == packed.counters.positions == padded.counters.tokens
    assert packed.padding_share == 0
    assert padded.counters.positions > padded.counters.tokens
    assert packed.counters.examples == padded.counters.examples


def test_a_run_says_its_positions_and_refuses_a_family_before_weights_load(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = ["train", "quickstart", "--dry-run", "--json"]
    shown = []
    for value in ("false", "true"):
        assert run([*recipe, "--set", f"train.packing={value}"]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    padded, packed = shown
    assert packed["positions"] == padded["positions"]
    counts = padded["positions"]
    assert packed["padding_share"] == 0
    assert padded["padding_share"] == pytest.approx(1 - counts["packed"] / counts["padded"])
    make_tiny_model("gpt2").config.save_pretrained(tmp_path)
    make_byte_tokenizer().save_pretrained(tmp_path)
    settings = [f"model.model_name_or_path={tmp_path}", "method=lora", "train.packing=true"]
    sets = [part for setting in settings for part in ("--set", setting)]
    assert run(["train", "quickstart", "--dry-run", *sets]) == 2
    assert "train.packing: GPT2LMHeadModel (gpt2) is not known" in capsys.readouterr().err
