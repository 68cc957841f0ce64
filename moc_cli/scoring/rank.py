"""Multiple choice: the candidate of the highest log-likelihood after the prompt.

A tokenizer may join the blanks that end the prompt with the candidate's first word. Texts are
therefore tokenised complete: the context is what the prompt and all prompt+candidate texts share,
and every token that is not the same in all of them is scored.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from moc_cli.data.encode import common_prefix, prompt_tokens
from moc_cli.data.examples import ChoiceExample
from moc_cli.errors import DataError
from moc_cli.methods import TextModel
from moc_cli.scoring.batch_size import BatchSize, BatchSizeOption
from moc_cli.scoring.forward import Limits, Progress
from moc_cli.scoring.likelihood import Query, likelihoods


@dataclass(frozen=True)
class ItemScore:
    """One question: the right candidate, the chosen one, every candidate's log-probability and
    the distance from the best to the second best.
    """

    label: int
    prediction: int
    scores: tuple[float, ...]
    margin: float

    @property
    def correct(self) -> bool:
        """Whether the chosen candidate is the right one."""
        return self.prediction == self.label

    def sample(self) -> dict[str, Any]:
        """Return what samples.jsonl says of the question."""
        return asdict(self) | {"correct": self.correct}


def rank(
    model: TextModel,
    examples: Sequence[ChoiceExample],
    *,
    batch_size: BatchSizeOption | BatchSize,
    on_progress: Progress | None = None,
) -> list[ItemScore]:
    """Score every question, in the order of the examples; of equal scores the first wins.

    Prompts are never cut: raises DataError for one that has more tokens than the model positions.
    """
    queries = [query_of(model.tokenizer, example) for example in examples]
    limits = Limits.of(model.adapted.model)
    for example, query in zip(examples, queries, strict=True):
        limits.check(query.texts, f"{example.task}: a question")
    rows = likelihoods(model, queries, batch_size=batch_size, on_progress=on_progress)
    items = []
    for example, row in zip(examples, rows, strict=True):
        scores = tuple(score.log_prob for score in row)
        best, second, *_ = sorted(scores, reverse=True)
        items.append(ItemScore(example.label, scores.index(best), scores, best - second))
    return items


def query_length(tokenizer: PreTrainedTokenizerBase, example: ChoiceExample) -> int:
    """Count the tokens of a question with its longest candidate."""
    return max(map(len, query_of(tokenizer, example).texts))


def query_of(tokenizer: PreTrainedTokenizerBase, example: ChoiceExample) -> Query:
    """Split a question into its context and what its candidates add to it."""
    alone, *joint = prompt_tokens(tokenizer, example)
    end = min(common_prefix([alone, *joint]), *(len(ids) - 1 for ids in joint))
    if end < 1:
        raise DataError(f"{example.task}: a prompt shares no token with its candidates")
    return Query.of(joint[0][:end], [ids[end:] for ids in joint])
