"""Examples: what a row of a benchmark means, before any tokenizer sees it."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import TypeVar

from moc_cli.errors import DataError

Place = tuple[str, str, int]  # file or split, what its rows are called, the row's number
ANSWER = "the correct answer is "
# Which rows are held out or drawn does not follow the recipe's seed: runs that differ in it are
# compared on the same rows.
ROW_SEED = 0


@dataclass(frozen=True)
class ChoiceExample:
    """A question with options. `train_text[answer_start:]` is the answer that training shows;
    `eval_prompt + candidates[i]` is what evaluation scores; `candidates[label]` is right.
    """

    task: str
    train_text: str
    answer_start: int
    eval_prompt: str
    candidates: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class PairExample:
    """One sentence or two, with a class number or, for a regression, a score."""

    task: str
    text_a: str
    text_b: str | None
    label: int | float


@dataclass(frozen=True)
class InstructionExample:
    """A request in the words that the model sees, and what it should write. `place`, not compared:
    where its row is.
    """

    task: str
    prompt: str
    output: str
    place: Place = field(default=("", "row", 0), compare=False)

    @property
    def train_text(self) -> str:
        """Prompt and output, as training shows them."""
        return self.prompt + self.output

    @property
    def answer_start(self) -> int:
        """The character of `train_text` where the output begins."""
        return len(self.prompt)


@dataclass(frozen=True)
class TextExample:
    """A plain text, all of it to be learned."""

    task: str
    train_text: str

    @property
    def answer_start(self) -> int:
        """The first character: nothing is given."""
        return 0


@dataclass(frozen=True)
class ChatExample:
    """A conversation: (role, content) of each turn. `place`, not compared: where its row is.

    `record` is the JSON of its messages and tools where they hold more than role and content.
    `unlearned` are the numbers of the answers that are not learned.
    """

    task: str
    messages: tuple[tuple[str, str], ...]
    place: Place = field(default=("", "row", 0), compare=False)
    record: str = field(default="", metadata={"optional": True})
    unlearned: tuple[int, ...] = field(default=(), metadata={"optional": True})


Example = ChoiceExample | PairExample | InstructionExample | TextExample | ChatExample
T = TypeVar("T")
E = TypeVar("E", bound=Example)


def fingerprint(examples: Iterable[Example]) -> str:
    """Sha256 of the examples in their order: every field but the place of the row.

    Optional fields count only where they say something.
    """
    digest = hashlib.sha256()
    for example in examples:
        values = [
            getattr(example, field.name)
            for field in fields(example)
            if field.compare
            and (not field.metadata.get("optional") or getattr(example, field.name))
        ]
        digest.update(json.dumps(values, ensure_ascii=False).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def row_hashes(examples: Iterable[Example]) -> list[str]:
    """Name each example by the first 16 digits of its fingerprint."""
    return [fingerprint([example])[:16] for example in examples]


def subset(examples: Sequence[T], count: int | None) -> list[T]:
    """`count` of the examples in their order, drawn; all where count is None or more."""
    if count is None or count >= len(examples):
        return list(examples)
    chosen = random.Random(f"subset {ROW_SEED}").sample(range(len(examples)), count)
    return [examples[index] for index in sorted(chosen)]


def hold_out(examples: list[E], count: int | float) -> tuple[list[E], list[E]]:
    """Cut `count` different examples, or a share of them, from the rest: (rest, held out).

    Copies of a held-out example leave the rest too: WinoGrande's training
    rows occur up to three times, and a copy left behind would let the held-out score reward memory.
    Raises DataError where nothing would be left to train on.
    """
    if isinstance(count, float):
        count = max(1, round(count * len(examples)))
    order = list(range(len(examples)))
    random.Random(f"held-out {ROW_SEED}").shuffle(order)
    held_out = list(dict.fromkeys(examples[index] for index in order))[:count]
    removed = set(held_out)
    rest = [example for example in examples if example not in removed]
    if len(held_out) < count or not rest:
        different = len(set(examples))
        duplicates = f", only {different} of them different" if different < len(examples) else ""
        hint = f"give a smaller number, as --set data.held_out={max(1, different // 5)}"
        if different < 2:
            hint = "data.held_out=0 trains on all rows and scores none, or give more rows"
        raise DataError(
            f"cannot hold out {count} of {len(examples)} training rows{duplicates}", hint
        )
    return rest, held_out
