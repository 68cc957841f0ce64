"""The micro-batches of a training: of its own rows where they are at hand, else full ones."""

import random
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.data.batches import padding_tokenizer
from moc_cli.data.encode import Encoded
from moc_cli.data.packing import pack
from moc_cli.kinds import Kind, make_kind
from moc_cli.planning.replay import Batch
from moc_cli.recipe.schema import Recipe
from moc_cli.training import build
from moc_cli.training.dry_run import OutOfReach, encode_within_reach
from moc_cli.training.loop_types import total_steps


@dataclass(frozen=True)
class Work:
    """What a training does: its `largest` micro-batch, and how many of that size its micro-batches
    come to, by their slots for tokens; None where neither rows nor train.max_steps tell it.

    The longest row that is trained on or scored has `scored_tokens` tokens.
    """

    largest: Batch
    kind: Kind
    times: float | None
    scored_tokens: int


class Rows:
    """The rows of a recipe; without them every micro-batch is full, with rows of data.max_length
    tokens. `longest` are the tokens of the longest prompt that is scored.
    """

    def __init__(
        self,
        encoded: Encoded | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        longest: int = 0,
    ) -> None:
        self._encoded, self._tokenizer, self.longest = encoded, tokenizer, longest

    @classmethod
    def of(
        cls, rows: build.TrainingRows, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> "Rows":
        """Those that a training has read. Of each task the text with most letters is measured."""
        kind, tests = rows.kind, rows.splits.tests.values()
        texts = [max(examples, key=lambda e: len(kind.prompt(e))) for examples in tests if examples]
        prompts = kind.voters(texts, tokenizer, max_length) if texts else []
        return cls(
            rows.encoded, tokenizer, max((len(row["input_ids"]) for row in prompts), default=0)
        )

    def work(self, recipe: Recipe, processes: int = 1) -> Work:
        """Return what the training of a recipe does on these rows, in each of its processes."""
        kind, settings = make_kind(recipe.data.task), build.make_settings(recipe)
        rows = settings.per_device_train_batch_size
        if self._encoded is None or self._tokenizer is None:
            micro_batches = settings.max_steps * settings.gradient_accumulation_steps
            longest = recipe.data.max_length
            batch = full_batch(rows, longest, kind, recipe.train.packing)
            return Work(batch, kind, micro_batches if micro_batches > 0 else None, longest)
        data = build.make_data(recipe, kind, self._encoded, self._tokenizer)
        lengths, epoch = self._encoded.lengths, data.batches.epoch(0)
        slots = [_slots([lengths[row] for row in rows], recipe.train.packing) for rows in epoch]
        largest = max(range(len(epoch)), key=slots.__getitem__)
        steps = total_steps(replace(settings, processes=processes), data.batches)
        micro_batches = steps * settings.gradient_accumulation_steps
        mean = sum(slots) / len(slots) / slots[largest]
        scored = max(self.longest, *lengths)
        return Work(data.collate(epoch[largest]), kind, micro_batches * mean, scored)


def read_rows(recipe: Recipe, model: PreTrainedModel) -> tuple[Rows, str | None]:
    """Return the rows of a recipe, and why there are none where a hub would be needed."""
    try:
        rows, tokenizer = encode_within_reach(recipe, None, model)
    except OutOfReach as away:
        return Rows(None), str(away)
    return Rows.of(rows, tokenizer, recipe.data.max_length), None


def _slots(lengths: list[int], packing: bool) -> int:
    return sum(lengths) if packing else len(lengths) * max(lengths)


def full_batch(rows: int, tokens: int, kind: Kind, packing: bool = False) -> Batch:
    """Return a batch that learns every token, with some padding in its last row, or packed."""
    ids = [1] * tokens
    row = {"input_ids": ids, "labels": kind.made_up_label(ids, random.Random(0))}
    if packing:
        return pack([row] * rows)
    batch = kind.collate([row] * rows, padding_tokenizer())
    batch["attention_mask"][-1, tokens // 2 + 1 :] = 0
    return batch
