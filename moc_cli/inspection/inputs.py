"""The rows whose routes are looked at: a task's prompts, or one text of the user's."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from moc_cli.data.encode import Row
from moc_cli.errors import DataError


@dataclass(frozen=True)
class Prompts:
    """Rows of tokens that all vote; `typed` rows hold token types too."""

    rows: list[Row]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row["input_ids"]) for row in self.rows]


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Encode one text as the model's tokenizer does, special tokens included.

    Raises DataError where no token comes out.
    """
    encoded = dict(tokenizer(text, verbose=False))
    if not encoded["input_ids"]:
        raise DataError("the text has no tokens", "give some words after --text")
    types = {"token_type_ids": encoded["token_type_ids"]} if "token_type_ids" in encoded else {}
    return Prompts([_row(list(encoded["input_ids"])) | types])


def _row(ids: list[int]) -> Row:
    return {"input_ids": ids, "labels": list(ids)}
