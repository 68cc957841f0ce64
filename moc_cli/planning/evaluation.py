"""One batch of an evaluation, as scoring works on it, with tokens that are made up."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from moc_cli.data.batches import padding_tokenizer
from moc_cli.kinds import Kind
from moc_cli.methods import Adapted, TextModel
from moc_cli.models.tokens import max_positions
from moc_cli.planning.fake_device import META
from moc_cli.recipe.schema import Recipe
from moc_cli.scoring.forward import evaluating
from moc_cli.scoring.generate import NEW_TOKENS, settings


@dataclass(frozen=True)
class Scoring:
    """How an evaluation scores a batch: `rows` rows of `tokens` tokens, and with how many beams it
    lets the model answer (0: not at all).
    """

    kind: Kind
    rows: int
    tokens: int
    beams: int = 0


def scoring_of(recipe: Recipe, model: PreTrainedModel, kind: Kind, tokens: int) -> Scoring:
    """Return how a recipe scores rows of at most `tokens` tokens.

    With eval.per_device_eval_batch_size: auto it takes as many rows as have room: one counts.
    """
    rows, positions = recipe.eval.per_device_eval_batch_size, max_positions(model)
    beams = kind.beams if recipe.data.kind.generates(recipe.eval.protocol) else 0
    tokens = tokens if positions is None else min(tokens, positions)
    return Scoring(kind, 1 if rows == "auto" else rows, tokens, beams)


def score(adapted: Adapted, scoring: Scoring) -> None:
    """Score a batch on the fake device; then have it answered, where the recipe asks for it."""
    model: Any = adapted.model
    made_up = TextModel(adapted, padding_tokenizer())
    scoring.kind.score_made_up(made_up, scoring.rows, scoring.tokens, META)
    if scoring.beams:
        ids = torch.ones(scoring.rows, scoring.tokens, dtype=torch.long, device=META)
        limits = settings(model, made_up.tokenizer, beams=scoring.beams, new_tokens=NEW_TOKENS)
        with evaluating(model), limits:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
