"""The rows whose routes are looked at: a task's prompts, or one text of the user's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from moc_cli.data.encode import (
    Row,
    common_prefix,
    encode_pairs,
    encode_train,
    prompt_tokens,
)
from moc_cli.data.examples import ChoiceExample, Example, PairExample
from moc_cli.data.suites import check_task, load_examples, scored_splits
from moc_cli.errors import DataError
from moc_cli.evaluation.suite import Task
from moc_cli.recipe.schema import DataSection


def read_rows(
    data: DataSection, tasks: Sequence[str], split: str | None, limit: int | None
) -> list[Task]:
    """Read `limit` rows of each task, those that `moc eval --limit` would draw.

    Without a split the scored ones are read. Raises DataError for an unknown task or split and
    for rows that cannot be used.
    """
    if data.suite == "custom":
        return _own_rows(data, tasks, split, limit)
    for name in tasks:
        check_task(data.suite, name)
    found = []
    for name in tasks:
        splits = [split] if split else scored_splits(data.suite, name)
        for each in splits:
            shown = name if each == splits[0] else f"{name} ({each.removeprefix('validation_')})"
            rows = load_examples(cast(Any, data.suite), name, each, path=data.path)
            found.append(Task.draw(shown, rows, limit))
    return found


def _own_rows(
    data: DataSection, tasks: Sequence[str], split: str | None, limit: int | None
) -> list[Task]:
    from moc_cli.data.custom.rows import read_scored

    other = [name for name in tasks if name not in data.tasks]
    if other or split:
        what = f"task '{other[0]}'" if other else f"split '{split}'"
        raise DataError(
            f"the run was trained on rows of one's own, which have no {what}",
            f"leave it out; its task is {data.tasks[0]}",
        )
    return [Task.draw(data.tasks[0], read_scored(data), limit)]


@dataclass(frozen=True)
class Prompts:
    """Rows of tokens that all vote; `typed` rows hold token types too."""

    rows: list[Row]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [len(row["input_ids"]) for row in self.rows]


def encode_prompts(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Prompts:
    """Encode what votes when the examples are scored.

    Of a question, all that its candidates share with the prompt, which is never cut; of sentences
    and pairs all, cut to `max_length`; of one's own texts what comes before the answer, or where
    nothing does the first token.
    """
    if examples and isinstance(examples[0], PairExample):
        return Prompts(encode_pairs(cast(Any, examples), tokenizer, max_length=max_length).rows)
    if examples and isinstance(examples[0], ChoiceExample):
        shared = [
            _row(ids[0][: common_prefix(ids)])
            for ids in (prompt_tokens(tokenizer, cast(Any, example)) for example in examples)
        ]
        return Prompts(shared)
    encoded = encode_train(examples, tokenizer, max_length=max_length, train_on_inputs=False)
    pairs = zip(encoded.rows, encoded.prompt_lengths, strict=True)
    return Prompts([_row(row["input_ids"][: max(1, length)]) for row, length in pairs])


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    """Encode one text as the model's tokenizer does, special tokens included.

    Raises DataError where no token comes out.
    """
    found = dict(tokenizer(text, verbose=False))
    if not found["input_ids"]:
        raise DataError("the text has no tokens", "give some words after --text")
    types = {"token_type_ids": found["token_type_ids"]} if "token_type_ids" in found else {}
    return Prompts([_row(list(found["input_ids"])) | types])


def _row(ids: list[int]) -> Row:
    return {"input_ids": ids, "labels": list(ids)}
