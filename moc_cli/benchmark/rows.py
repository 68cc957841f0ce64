"""Rows to be measured with: random tokens, or the recipe's own rows."""

import random

from transformers import PreTrainedModel

from moc_cli.data.encode import IGNORED, Encoded, Row
from moc_cli.kinds import make_kind
from moc_cli.models.tokens import embeddings, max_positions
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build

SAMPLE = 4096  # the recipe's own rows are as many at most, drawn at random


def make_rows(recipe: Recipe, model: PreTrainedModel, number: int, *, own_rows: bool) -> Encoded:
    """Return rows that fit a model: `number` of random tokens, or the recipe's with `own_rows`.

    Random rows have `data.max_length` tokens, or as many as the model takes, and all are learned.
    Of own rows, lengths and learned places are kept; ids that the model lacks become others, as
    the tokenizer may be that of another model.
    """
    if own_rows:
        return _own_rows(recipe, embeddings(model))
    kind = make_kind(recipe.data.task)
    length = min(recipe.data.max_length, max_positions(model) or recipe.data.max_length)
    rng = random.Random(recipe.seed)
    rows: list[Row] = []
    for _ in range(number):
        ids = rng.choices(range(embeddings(model)), k=length)
        rows.append({"input_ids": ids, "labels": kind.made_up_label(ids, rng)})
    return Encoded(rows, [1] * number, 0, 0, "")


def _own_rows(recipe: Recipe, vocabulary: int) -> Encoded:
    recipe, splits = build.read_rows(recipe)
    examples = splits.train
    if len(examples) > SAMPLE:
        examples = random.Random(recipe.seed).sample(examples, SAMPLE)
    encoded = make_kind(recipe.data.task).encode(
        examples,
        build.make_tokenizer(recipe.model, recipe.data.chat_template),
        max_length=recipe.data.max_length,
        train_on_inputs=recipe.data.train_on_inputs,
    )
    for row in encoded.rows:
        row["input_ids"] = [token % vocabulary for token in row["input_ids"]]
        if isinstance(row["labels"], list):
            row["labels"] = [
                token if token == IGNORED else token % vocabulary for token in row["labels"]
            ]
    return encoded
