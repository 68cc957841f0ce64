"""Multiple choice: the candidate of the highest log-likelihood after the prompt.

A question falls into three parts, computed in at most two steps on one key-value cache:

    prompt     the tokens that the prompt and all prompt+candidate texts share; only they vote
    trunk      the tokens that all candidates share after that, fed together with the prompt
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
from moc_cli.scoring.batch_size import Asked, BatchSize, Shape, run_batches
from moc_cli.scoring.forward import (
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
        return {
            "label": self.label,
            "prediction": self.prediction,
            "scores": list(self.scores),
            "correct": self.correct,
            "margin": self.margin,
        }


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
        copies = sum(len(branch) > 1 for branch in self.branches)
        fed, more = len(self.prompt) + len(self.trunk), max(map(len, self.branches))
        return Shape(fed, more, max(1, copies), logits=max(len(self.trunk) + 1, more))


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
    texts = [question.prompt + question.trunk for question in questions]
    trunks = [question.trunk for question in questions]
    ids, mask = pad_left(texts, pad, device)  # (B, T)
    prompts = torch.tensor([[len(question.prompt)] for question in questions], device=device)
    longest = max(map(len, trunks))
    with voting(adapted, mask * (mask.cumsum(-1) <= prompts)):
        out = call(
            adapted.model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=True,
            logits_to_keep=longest + 1,
        )
    steps = _log_probs(out.logits[:, -longest - 1 :])  # (B, longest + 1, V)
    cache, following = out.past_key_values, steps[:, -1]
    ids, valid = pad_left(trunks, pad, device)  # (B, longest)
    chosen = steps[:, :-1].gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    shared = (chosen.double() * valid).sum(1).tolist()
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
        totals = _follow(adapted, cache, mask[rows], following[rows], tokens, pad)
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
) -> list[float]:
    """Feed each row its tokens, but for the last one: the log-probability of them all.

    `following` (B, V) are the log-probabilities of the first token.
    """
    ids, valid = pad_right([row[:-1] for row in tokens], pad, mask.device)  # (B, S)
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
    return _sum(torch.cat([following.unsqueeze(1), _log_probs(out.logits)], dim=1), tokens)


def _sum(steps: Tensor, tokens: list[list[int]]) -> list[float]:
    """Sum each row's log-probabilities, (B, S, V), at its tokens."""
    ids, valid = pad_right(tokens, 0, steps.device)  # (B, S), or shorter
    chosen = steps[:, : ids.shape[1]].gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return (chosen.double() * valid).sum(1).tolist()


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
