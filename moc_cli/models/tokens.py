"""Whether a tokenizer goes with a model: ids and embeddings, padding, end tokens, positions.

Only shapes and the config of the model are read, so that it may lie on the meta device.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.models.families import FAMILIES

_SPECIAL = 16  # more special tokens than a tokenizer puts around a text


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that fills batches: the tokenizer's pad token, else its end token, else 0."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in ids if token is not None)


def pad_tokens(model: PreTrainedModel) -> tuple[int | None, int | None]:
    """The pad token of a model's config: of the part that reads text, and of the whole."""
    config: Any = model.config
    own, of_text = (
        getattr(part, "pad_token_id", None) for part in (config, config.get_text_config())
    )
    return of_text, own


def set_pad_tokens(model: PreTrainedModel, of_text: int | None, own: int | None) -> None:
    """Set what `pad_tokens` returns."""
    config: Any = model.config
    config.pad_token_id = own
    config.get_text_config().pad_token_id = of_text


def pooling_token(model: PreTrainedModel) -> int | None:
    """The pad token by which a classifier that is a decoder finds the last token of a row.

    None for a language model, and for an encoder, whose classifier does not ask for it.
    """
    family = FAMILIES.get(model.config.model_type)
    if model.can_generate() or (family is not None and not family.placement.causal):
        return None
    return pad_tokens(model)[0]


def max_positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for; None where its config does not say.

    RoBERTa's table of positions begins with those of its padding: 514 rows are 512 positions.
    """
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit < 1:  # XLNet writes -1 for a model without a limit
        return None
    tables = (
        module
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
    )
    offsets = (table.padding_idx + 1 for table in tables if table.padding_idx is not None)
    return limit - max(offsets, default=0)


def embeddings(model: PreTrainedModel) -> int:
    """How many token ids the model has an embedding for."""
    table: Any = model.get_input_embeddings()
    return int(table.weight.shape[0])


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: those of the model's generation config, and the tokenizer's."""
    config = model.generation_config
    config_ends = config.eos_token_id if config else None
    ends = config_ends if isinstance(config_ends, list) else [config_ends]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of texts that are to be continued, special tokens included but for those at the
    end: a tokenizer that closes every text (`add_eos_token`) would close the prompt too.
    """
    if not texts:
        return []
    encoded = tokenizer(list(texts), return_special_tokens_mask=True, verbose=False)
    rows = []
    for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
        end = len(ids)
        while end > 1 and special[end - 1]:
            end -= 1
        rows.append(list(ids[:end]))
    return rows


def may_exceed(texts: Sequence[str], limit: int) -> bool:
    """Whether texts may together have more tokens than `limit`, estimated from their bytes: a token
    stands for one byte at least, but for the few special ones.
    """
    return sum(len(text.encode()) for text in texts) + _SPECIAL > limit


def match_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answer_ends: Sequence[int] = ()
) -> list[str]:
    """Give model and tokenizer the same pad token and end tokens; say what was taken for what.

    Padding: a pad token without an embedding, or none, becomes the end token. A classifier that is
    a decoder pools the last token that is not `config.pad_token_id`, which is set to the token that
    fills batches. Ends: a language model's generations end at the tokenizer's end token too, and at
    `answer_ends`, those that its chat template puts after an answer.
    """
    notes = _match_padding(tokenizer, embeddings(model))
    if not model.can_generate():
        before, pad = pad_tokens(model)[0], pad_token_id(tokenizer)
        if before != pad:
            notes.append(
                f"the model's pad token was {_shown(tokenizer, before)}; it is now "
                f"that of the batches, {_shown(tokenizer, pad)}"
            )
        set_pad_tokens(model, pad, pad)
        return notes
    new = [end for end in answer_ends if end not in end_tokens(model, tokenizer)]
    notes += [f"a generation also ends at {_shown(tokenizer, end)}" for end in new]
    if model.generation_config is not None:
        ends = sorted({*end_tokens(model, tokenizer), *new})
        model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    return notes


def compare_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Say what is unusual about a tokenizer for a model, and does not stop a run."""
    notes, rows, size = [], embeddings(model), len(tokenizer)
    if size > rows:
        notes.append(
            f"the tokenizer has {size:,} tokens and the model {rows:,} embeddings: rows with one "
            "of the tokens beyond them cannot be used"
        )
    elif size < rows:
        notes.append(
            f"the model has {rows:,} embeddings and the tokenizer {size:,} tokens: no text uses "
            "the others"
        )
    if model.can_generate() and tokenizer.eos_token_id is None:
        notes.append(
            "the tokenizer has no end token: rows are trained without one, and a generation goes "
            "on to its limit"
        )
    return notes


def token_problems(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]
) -> list[str]:
    """Name the tokens in `rows` that the model has no embedding for, at most three."""
    size = embeddings(model)
    beyond = sorted({token for row in rows for token in row if token >= size})
    return [
        f"the model has {size:,} embeddings (ids 0 to {size - 1}), and the rows hold the token "
        f"{_shown(tokenizer, token)}"
        for token in beyond[:3]
    ]


def _match_padding(tokenizer: PreTrainedTokenizerBase, size: int) -> list[str]:
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is not None and pad < size:
        return []
    pad_token = "none" if pad is None else f"{_shown(tokenizer, pad)}, for which the model has none"
    problem = f"the tokenizer's pad token is {pad_token}"
    if end is None or end >= size:
        tokenizer.pad_token = None
        return [f"{problem}: batches are filled with token 0"]
    tokenizer.pad_token = tokenizer.eos_token
    return [f"{problem}: batches are filled with {_shown(tokenizer, end)}"]


def _shown(tokenizer: PreTrainedTokenizerBase, token: int | None) -> str:
    if token is None:
        return "none"
    return f"'{tokenizer.convert_ids_to_tokens(token)}' ({token})"
