"""Multiple choice: the candidate of the highest log-likelihood after the prompt.

A question is computed in up to three steps on one key-value cache:

    prompt     the tokens that the prompt and all prompt+candidate texts share; only they vote
    trunk      the tokens that all candidates share after that
    branches   what is left of each candidate; cache rows are repeated for those of several tokens

A tokenizer may join the blanks that end the prompt with the candidate's first word. Texts are
therefore tokenised whole, and every token that is not the same in all of them is scored. The score
is the sum of the log-probabilities of trunk and branch, not normalised, without an end token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moc_cli.data.batches import pad_token_id
from moc_cli.data.encode import common_prefix, prompt_tokens
from moc_cli.data.examples import ChoiceExample
from moc_cli.errors import DataError
from moc_cli.evaluation.forward import (
    Progress,
    Scorable,
    call,
    check_finite,
    check_fits,
    evaluating,
    pad_left,
    pad_right,
    positions,
    voting,
)
from moc_cli.evaluation.sizing import Asked, BatchSize, Shape, run_batches


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


@dataclass(frozen=True)
class _Question:
    prompt: list[int]
    trunk: list[int]
    branches: list[list[int]]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.trunk) + max(map(len, self.branches))

    @property
    def shape(self) -> Shape:
        """What its computation takes: the prompt's cache, and a copy for each longer branch."""
        more = self.length - len(self.prompt)
        copies = sum(len(branch) > 1 for branch in self.branches)
        return Shape(len(self.prompt), more, max(1, copies), logits=more + 1)


def rank(
    adapted: Scorable,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[ChoiceExample],
    *,
    batch_size: Asked | BatchSize,
    on_progress: Progress | None = None,
) -> list[ItemScore]:
    """Score every question, in the order of the examples; of equal scores the first wins.

    Prompts are never cut: raises DataError for one that has more tokens than the model positions.
    """
    model = adapted.model
    questions = [_split(tokenizer, example) for example in examples]
    for example, question in zip(examples, questions, strict=True):
        check_fits(model, question.length, f"{example.task}: a question")
    shapes = [question.shape for question in questions]
    with evaluating(model) as device:

        def work(items: list[int]) -> list[list[float]]:
            asked = [questions[item] for item in items]
            return _score(adapted, asked, pad_token_id(tokenizer), device)

        scores = run_batches(model, shapes, work, size=batch_size, on_progress=on_progress)
    return [_judge(example, found) for example, found in zip(examples, scores, strict=True)]


def _split(tokenizer: PreTrainedTokenizerBase, example: ChoiceExample) -> _Question:
    alone, *joint = prompt_tokens(tokenizer, example)
    shared = common_prefix(joint)
    end = common_prefix([alone, joint[0][:shared]])
    if end == 0:
        raise DataError(f"{example.task}: a prompt shares no token with its candidates")
    return _Question(joint[0][:end], joint[0][end:shared], [ids[shared:] for ids in joint])


def _judge(example: ChoiceExample, scores: list[float]) -> ItemScore:
    check_finite(scores)
    best, second, *_ = sorted(scores, reverse=True)
    return ItemScore(example.label, scores.index(best), tuple(scores), best - second)


def _score(
    adapted: Scorable, questions: list[_Question], pad: int, device: torch.device
) -> list[list[float]]:
    """Log-probability of each candidate of each question."""
    prompts, mask = pad_left([question.prompt for question in questions], pad, device)  # (B, P)
    out = call(
        adapted.model,
        input_ids=prompts,
        attention_mask=mask,
        position_ids=positions(mask),
        use_cache=True,
        logits_to_keep=1,
    )
    cache, following = out.past_key_values, _log_probs(out.logits[:, -1])  # (B, V)
    trunks = [question.trunk for question in questions]
    shared, following, mask = _follow(adapted, cache, mask, following, trunks, pad)
    pairs = [(row, branch) for row, q in enumerate(questions) for branch in q.branches]
    scores = _branches(adapted, cache, mask, following, pairs, pad)
    found: list[list[float]] = [[] for _ in questions]
    for (row, _), score in zip(pairs, scores, strict=True):
        found[row].append(shared[row] + score)
    return found


def _branches(
    adapted: Scorable,
    cache: Any,
    mask: Tensor,
    following: Tensor,
    pairs: list[tuple[int, list[int]]],
    pad: int,
) -> list[float]:
    """Log-probability of each branch, given the row it grows from.

    The first token needs no computation; only rows of longer branches are repeated in the cache.
    """
    rows = torch.tensor([row for row, _ in pairs], device=mask.device)
    scores = _sum(following[rows].unsqueeze(1), [branch[:1] for _, branch in pairs])
    longer = [number for number, (_, branch) in enumerate(pairs) if len(branch) > 1]
    if longer:
        rows = rows[longer]
        cache.batch_select_indices(rows)
        tokens = [pairs[number][1] for number in longer]
        totals, _, _ = _follow(adapted, cache, mask[rows], following[rows], tokens, pad, last=False)
        for number, total in zip(longer, totals, strict=True):
            scores[number] = total
    return scores


def _follow(
    adapted: Scorable,
    cache: Any,
    mask: Tensor,
    following: Tensor,
    tokens: list[list[int]],
    pad: int,
    last: bool = True,
) -> tuple[list[float], Tensor, Tensor]:
    """Feed each row its tokens: their log-probability, the next token's log-probs, the new mask.

    `following` (B, V) are the log-probabilities of the first token. Without `last` nothing comes
    after the tokens, and the last one of each row is not fed.
    """
    fed = tokens if last else [row[:-1] for row in tokens]
    if not any(fed):
        return _sum(following.unsqueeze(1), tokens), following, mask
    ids, valid = pad_right(fed, pad, mask.device)  # (B, S)
    extended = torch.cat([mask, valid], dim=1)
    with voting(adapted, torch.zeros_like(valid)):  # a running route would count the candidates
        out = call(
            adapted.model,
            input_ids=ids,
            attention_mask=extended,
            position_ids=positions(extended)[:, mask.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        )
    steps = torch.cat([following.unsqueeze(1), _log_probs(out.logits)], dim=1)  # (B, 1+S, V)
    rows = torch.arange(len(fed), device=mask.device)
    return _sum(steps, tokens), steps[rows, valid.sum(1)], extended


def _sum(steps: Tensor, tokens: list[list[int]]) -> list[float]:
    """Sum each row's log-probabilities, (B, S, V), at its tokens."""
    ids, valid = pad_right(tokens, 0, steps.device)  # (B, S), or shorter
    chosen = steps[:, : ids.shape[1]].gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return (chosen.double() * valid).sum(1).tolist()


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
