"""What the kinds of task share that train a language model."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moc_cli.data.batches import LossKind, collate
from moc_cli.data.custom.chat import check_chats
from moc_cli.data.encode import Encoded, Row, encode_chats, encode_texts, has_target
from moc_cli.data.examples import ChatExample
from moc_cli.kinds.kind import Kind
from moc_cli.methods import TextModel
from moc_cli.recipe.tasks import LANGUAGE
from moc_cli.scoring.forward import Progress
from moc_cli.scoring.loss import HeldOutLoss, lm_loss
from moc_cli.scoring.results import ScoringOptions


def _are_chats(examples: Sequence[Any]) -> bool:
    return bool(examples) and isinstance(examples[0], ChatExample)


class Causal(Kind):
    """Rows of tokens whose answers a language model learns; only what comes before them votes.

    Tokens of an answer do not vote when it is scored: their vote would tell earlier positions what
    comes.
    """

    loss: LossKind = "causal"

    def model_arguments(self) -> dict[str, Any]:
        """A language model."""
        return {"kind": LANGUAGE.name}

    def check(self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Raise DataError naming every conversation that the chat template refuses; return what it
        does not write of the others.
        """
        return check_chats(examples, tokenizer) if _are_chats(examples) else []

    def encode(
        self,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        train_on_inputs: bool,
    ) -> Encoded:
        """Encode texts with their answers; of conversations the assistant's turns are learned."""
        encode = encode_chats if _are_chats(examples) else encode_texts
        return encode(examples, tokenizer, max_length=max_length, train_on_inputs=train_on_inputs)

    def encode_answers(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> Encoded:
        """Encode with labels on answers alone, whatever training learns beside them."""
        return self.encode(examples, tokenizer, max_length=max_length, train_on_inputs=False)

    def has_targets(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> bool:
        """Whether any of the examples has an answer left in `max_length` tokens."""
        rows = (self.encode_answers([example], tokenizer, max_length).rows for example in examples)
        return any(has_target(row) for (row,) in rows)

    def collate(self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
        """Pad on the left; labels (B, T)."""
        return collate(rows, tokenizer, side=LANGUAGE.side, kind="causal")

    def answer_loss(
        self,
        model: TextModel,
        examples: Sequence[Any],
        options: ScoringOptions,
        on_progress: Progress | None = None,
    ) -> HeldOutLoss:
        """Compute the loss of the answers' tokens; rows are cut to `options.max_length`."""
        encoded = self.encode_answers(examples, model.tokenizer, options.max_length)
        size = options.batch_size
        return lm_loss(model, encoded, batch_size=size, on_progress=on_progress)

    def row_losses(
        self,
        model: TextModel,
        examples: Sequence[Any],
        options: ScoringOptions,
    ) -> list[float]:
        """Return the mean loss of each row's answer, without rows whose answer was cut off."""
        rows = self.answer_loss(model, examples, options).rows
        return [loss / tokens for loss, tokens in rows if tokens]
