"""One batch of an evaluation, as scoring works on it, with tokens that are made up."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moc_cli.data.batches import LossKind
from moc_cli.methods import Adapted, TextModel
from moc_cli.models.tokens import max_positions
from moc_cli.planning.fake_device import META
from moc_cli.recipe.schema import Recipe
from moc_cli.scoring.forward import evaluating
from moc_cli.scoring.generate import BEAMS, NEW_TOKENS, settings
from moc_cli.scoring.likelihood import Query, likelihoods

_NO_TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=None)


@dataclass(frozen=True)
class Scoring:
    """How an evaluation scores a batch: `rows` rows of `tokens` tokens, and with how many beams it
    lets the model answer (0: not at all).
    """

    kind: LossKind
    rows: int
    tokens: int
    beams: int = 0


def scoring_of(recipe: Recipe, model: PreTrainedModel, kind: LossKind, tokens: int) -> Scoring:
    """Return how a recipe scores rows of at most `tokens` tokens.

    With eval.per_device_eval_batch_size: auto it takes as many rows as have room: one counts.
    """
    rows, positions = recipe.eval.per_device_eval_batch_size, max_positions(model)
    beams = BEAMS if recipe.eval.protocol == "generate" else 0
    if recipe.data.format == "instruction":
        beams = 1
    tokens = tokens if positions is None else min(tokens, positions)
    return Scoring(kind, 1 if rows == "auto" else rows, tokens, beams)


def score(adapted: Adapted, scoring: Scoring) -> None:
    """Score a batch on the fake device, with the code of every evaluation.

    Questions have two options of one token, as those of the commonsense tasks have; then an answer
    is generated, where the recipe asks for it.
    """
    model: Any = adapted.model
    if scoring.kind != "causal":
        with evaluating(model):
            model(**_inputs(scoring))
        return
    queries = [Query([1] * (scoring.tokens - 1), [], [[1], [1]])] * scoring.rows
    likelihoods(TextModel(adapted, _NO_TOKENIZER), queries, batch_size=scoring.rows)
    if scoring.beams:
        limits = settings(model, _NO_TOKENIZER, beams=scoring.beams, new_tokens=NEW_TOKENS)
        with evaluating(model), limits:
            model.generate(**_inputs(scoring))


def _inputs(scoring: Scoring) -> dict[str, Tensor]:
    ids = torch.ones(scoring.rows, scoring.tokens, dtype=torch.long, device=META)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
