"""What the kinds of task share that train a language model."""

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from moc_cli.data.batches import collate, pad_batch
from moc_cli.data.custom.chat import check_chats
from moc_cli.data.encode import IGNORED, Encoded, Row, encode_chats, encode_texts, has_target
from moc_cli.data.examples import ChatExample
from moc_cli.kinds.kind import Examples, Kind, Observe, Tokenizer
from moc_cli.kinds.loss import LanguageLoss, TaskLoss
from moc_cli.methods import TextModel
from moc_cli.recipe.tasks import LANGUAGE
from moc_cli.scoring.forward import call, position_ids
from moc_cli.scoring.likelihood import Query, likelihoods
from moc_cli.scoring.loss import HeldOutLoss, lm_loss
from moc_cli.scoring.results import ScoringOptions


def _are_chats(examples: Examples) -> bool:
    return bool(examples) and isinstance(examples[0], ChatExample)


class Causal(Kind):
    """Rows of tokens whose answers a language model learns; only what comes before them votes.

    Tokens of an answer do not vote when it is scored: their vote would tell earlier positions what
    comes.
    """

    head = LANGUAGE
    loss: type[TaskLoss] = LanguageLoss

    def check(self, examples: Examples, tokenizer: Tokenizer) -> list[str]:
        """Raise DataError naming every conversation that the chat template refuses; return what it
        does not write of the others.
        """
        return check_chats(examples, tokenizer) if _are_chats(examples) else []

    def encode(
        self, examples: Examples, tokenizer: Tokenizer, *, max_length: int, train_on_inputs: bool
    ) -> Encoded:
        """Encode texts with their answers; of conversations the assistant's turns are learned."""
        encode = encode_chats if _are_chats(examples) else encode_texts
        return encode(examples, tokenizer, max_length=max_length, train_on_inputs=train_on_inputs)

    def encode_answers(self, examples: Examples, tokenizer: Tokenizer, max_length: int) -> Encoded:
        """Encode with labels on answers alone, whatever training learns beside them."""
        return self.encode(examples, tokenizer, max_length=max_length, train_on_inputs=False)

    def has_targets(self, examples: Examples, tokenizer: Tokenizer, max_length: int) -> bool:
        """Whether any of the examples has an answer left in `max_length` tokens."""
        rows = (self.encode_answers([example], tokenizer, max_length).rows for example in examples)
        return any(has_target(row) for (row,) in rows)

    def collate(self, rows: Sequence[Row], tokenizer: Tokenizer) -> dict[str, Tensor]:
        """Pad on the left; labels (B, T)."""
        return collate(rows, tokenizer, side=self.head.side)

    def made_up_label(self, ids: list[int], rng: random.Random) -> list[int]:
        """All tokens are learned but the first, before which there is nothing."""
        return [IGNORED, *ids[1:]]

    def forward(self, model: TextModel, rows: Sequence[Row], device: torch.device) -> None:
        """Without a cache, and with the logits of the last position alone."""
        batch = pad_batch(rows, model.tokenizer, side=self.head.side)
        inputs = {name: value.to(device) for name, value in batch.items()}
        inputs |= {"position_ids": position_ids(inputs["attention_mask"])}
        call(model.adapted.model, **inputs, use_cache=False, logits_to_keep=1)

    def score_made_up(self, model: TextModel, rows: int, tokens: int, device: torch.device) -> None:
        """As questions with two options of one token, as those of the commonsense tasks have."""
        queries = [Query([1] * (tokens - 1), [], [[1], [1]])] * rows
        likelihoods(model, queries, batch_size=rows)

    def answer_loss(
        self, model: TextModel, examples: Examples, options: ScoringOptions, observe: Observe = None
    ) -> HeldOutLoss:
        """Compute the loss of the answers' tokens; rows are cut to `options.max_length`."""
        encoded = self.encode_answers(examples, model.tokenizer, options.max_length)
        return lm_loss(model, encoded, batch_size=options.batch_size, on_progress=observe)

    def row_losses(
        self, model: TextModel, examples: Examples, options: ScoringOptions
    ) -> list[float]:
        """Return the mean loss of each row's answer, without rows whose answer was cut off."""
        rows = self.answer_loss(model, examples, options).rows
        return [loss / tokens for loss, tokens in rows if tokens]
