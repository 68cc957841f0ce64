"""What recipe, rows, tokenizer and model must have in common, asked before weights load.

Only shapes and the config of the model are read, so that it may lie on the meta device.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.data.custom.chat import answer_ends
from moc_cli.models.tokens import compare_tokens, match_tokens, max_positions, token_problems
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.sections import DataSection


def match(
    data: DataSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Give model and tokenizer the same padding and end tokens; say what was taken for what."""
    if data.format != "chat":
        return match_tokens(model, tokenizer)
    ends = answer_ends(tokenizer)
    notes = match_tokens(model, tokenizer, ends)
    if tokenizer.chat_template and not ends:
        notes.append(
            "the chat template ends an answer with no token of its own: a generation goes on to "
            "its limit"
        )
    return notes


def compare(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Say what is unusual about tokenizer and model, but stops no run."""
    return compare_tokens(model, tokenizer)


def problems(
    data: DataSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
) -> list[str]:
    """Name all that the model cannot take: more tokens than positions, tokens unknown to it."""
    limit = max_positions(model)
    positions = []
    if limit is not None and data.max_length > limit:
        positions = [f"data.max_length {data.max_length}, the model takes {limit}"]
    return positions + token_problems(model, tokenizer, rows)


def head_note(recipe: Recipe, heads: Sequence[str], classes: Mapping[Any, str]) -> str:
    """Say what becomes of a checkpoint's own head, and what its classes are beside the rows'."""
    names = ", ".join(heads)
    trained = set(heads) <= set(recipe.train.modules or ())
    fate = "trained further" if trained else "kept and frozen"
    text = f"the checkpoint has a head of its own ({names}), which is {fate}"
    if len(classes) > 1:
        labels = recipe.data.labels or range(len(classes))
        theirs = ", ".join(f"{number} = {name}" for number, name in sorted(classes.items()))
        ours = ", ".join(f"{number} = {label}" for number, label in enumerate(labels))
        text += f"; its classes: {theirs}; the rows' classes: {ours}"
    return text if trained else f"{text}; to train it: --set train.modules=[{names}]"
