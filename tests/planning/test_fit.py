"""A run that does not fit its GPU is refused before its weights load; `auto` finds what fits."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.messages import refused
from support.models import make_byte_tokenizer

from moc_cli.data.splits import Splits
from moc_cli.errors import MocError
from moc_cli.planning import fit
from moc_cli.planning.batches import Rows
from moc_cli.planning.fit import Forecast
from moc_cli.planning.plans import CONTEXT, Planner, alternatives_to
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe

GPU, CPU = torch.device("cuda"), torch.device("cpu")
NO_ROWS: Any = SimpleNamespace(encoded=None, kind=None, splits=Splits([], [], {}))


def recipe(mode: str) -> Recipe:
    changes = [f"train.activation_checkpointing={mode}", "method=control", "data.max_length=128"]
    return load_recipe("quickstart", changes)


@pytest.fixture(scope="module")
def needed() -> dict[str, int]:
    """Bytes beside the context that each way of recomputation needs."""
    planner = Planner(None, Rows(None))
    plans = [planner.plan(recipe(mode), all_layers=True) for mode in ("none", "full")]
    return {p.activation_checkpointing: p.peak_bytes - CONTEXT for p in plans}


def test_a_run_that_fits_is_planned_and_trained(
    needed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    forecast = Forecast(said.append, force=False)
    monkeypatch.setattr(fit, "free_bytes", lambda device: needed["none"])
    chosen, predicted = forecast(recipe("none"), NO_ROWS, make_byte_tokenizer(), GPU)
    assert chosen == recipe("none")
    assert predicted is not None
    assert 0 < predicted <= needed["none"]
    assert "activation checkpointing none" in said[0]
    monkeypatch.setattr(fit, "free_bytes", lambda device: (needed["none"] + needed["full"]) // 2)
    chosen, _ = forecast(recipe("auto"), NO_ROWS, make_byte_tokenizer(), GPU)
    assert chosen.train.activation_checkpointing in ("selective", "full")


def test_a_run_that_does_not_fit_is_refused_unless_forced(
    needed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "alternatives_to", lambda recipe: alternatives_to(recipe)[:2])
    monkeypatch.setattr(fit, "free_bytes", lambda device: needed["full"])
    refusing, forced = (Forecast(lambda text: None, force=force) for force in (False, True))
    with refused(MocError, number=r"\d+\.\d MB"):
        refusing(recipe("none"), NO_ROWS, make_byte_tokenizer(), GPU)
    assert forced(recipe("none"), NO_ROWS, make_byte_tokenizer(), GPU)[0] == recipe("none")
    monkeypatch.setattr(fit, "free_bytes", lambda device: 1)
    with refused(MocError, number=r"\d+\.\d MB"):
        refusing(recipe("none"), NO_ROWS, make_byte_tokenizer(), GPU)


def test_on_the_cpu_nothing_is_planned() -> None:
    said: list[str] = []
    forecast = Forecast(said.append, force=False)
    assert forecast(recipe("full"), NO_ROWS, make_byte_tokenizer(), CPU) == (recipe("full"), None)
    assert said == []
    chosen, predicted = forecast(recipe("auto"), NO_ROWS, make_byte_tokenizer(), CPU)
    assert (chosen.train.activation_checkpointing, predicted) == ("none", None)
    assert "none on the CPU" in said[0]
