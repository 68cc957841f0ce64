"""Log-probabilities of continuations after a context, which alone votes on the route.

A query takes at most two forward passes on one key-value cache:

    context, trunk  the trunk is what all continuations begin with; padded on the left
    branches        what is left of each continuation; padded on the right. The cache's rows are
                    repeated for branches of several tokens; of a branch of one token nothing is fed

The score is the sum of the log-probabilities of trunk and branch, without an end token and not
normalised by length.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moc_cli.data.encode import common_prefix
from moc_cli.methods import Adapted, TextModel
from moc_cli.models.tokens import pad_token_id
from moc_cli.scoring.batch_size import BatchSize, BatchSizeOption, RowCost, run_batches
from moc_cli.scoring.forward import (
    Progress,
    call,
    check_finite,
    evaluating,
    pad,
    position_ids,
    prompt_mask,
)

Tokens = list[int]


@dataclass(frozen=True)
class Likelihood:
    """Log p(continuation | context) in nats, and whether greedy decoding gives that text."""

    log_prob: float
    greedy: bool


@dataclass(frozen=True)
class Query:
    """The tokens of a context and of the continuations to score after it, split into the trunk
    that they share and a branch for each, which has at least one token.
    """

    context: Tokens
    trunk: Tokens
    branches: list[Tokens]

    @classmethod
    def of(cls, context: Tokens, continuations: Sequence[Tokens]) -> "Query":
        """Split continuations; each of them, and the context, has at least one token."""
        shared = common_prefix([tokens[:-1] for tokens in continuations])
        branches = [tokens[shared:] for tokens in continuations]
        return cls(context, continuations[0][:shared], branches)

    @property
    def texts(self) -> list[Tokens]:
        """The context with each continuation."""
        return [self.context + self.trunk + branch for branch in self.branches]

    @property
    def cost(self) -> RowCost:
        """What the computation takes: one cache, and a copy for every branch that is fed."""
        copies = sum(len(branch) > 1 for branch in self.branches)
        longest = max(map(len, self.branches))
        fed = len(self.context) + len(self.trunk)
        return RowCost(fed, longest - 1, max(1, copies), logits=max(len(self.trunk) + 1, longest))


def likelihoods(
    model: TextModel,
    queries: Sequence[Query],
    *,
    batch_size: BatchSizeOption | BatchSize,
    on_progress: Progress | None = None,
) -> list[list[Likelihood]]:
    """Score the continuations of every query, in their order.

    Raises MocError where the model's outputs are not finite.
    """
    network, pad_id = model.adapted.model, pad_token_id(model.tokenizer)
    costs = [query.cost for query in queries]
    with evaluating(network) as device:

        def score(items: list[int]) -> list[list[Likelihood]]:
            return _score(model.adapted, [queries[item] for item in items], pad_id, device)

        scores = run_batches(network, costs, score, size=batch_size, on_progress=on_progress)
    check_finite([score.log_prob for row in scores for score in row])
    return scores


def _score(
    adapted: Adapted, queries: list[Query], pad_id: int, device: torch.device
) -> list[list[Likelihood]]:
    """Score a batch of B queries with R continuations in all; S is the longest trunk or branch."""
    texts = [query.context + query.trunk for query in queries]
    ids, mask = pad(texts, pad_id, "left", device)  # (B, T)
    trunks, in_trunk = pad([query.trunk for query in queries], pad_id, "left", device)  # (B, S)
    with adapted.voting(prompt_mask(mask, [len(query.context) for query in queries])):
        out = call(
            adapted.model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids(mask),
            use_cache=True,
            logits_to_keep=trunks.shape[1] + 1,
        )
    cache = out.past_key_values
    steps = _log_probs(out.logits[:, -trunks.shape[1] - 1 :])  # (B, S + 1, V)
    trunk_scores, trunk_greedy = _at(steps[:, :-1], trunks, in_trunk)
    after_trunk = steps[:, -1]  # (B, V)

    branches = [branch for query in queries for branch in query.branches]
    owners = [row for row, query in enumerate(queries) for _ in query.branches]
    rows = torch.tensor(owners, device=device)  # (R,)
    first, valid = pad([branch[:1] for branch in branches], pad_id, "left", device)  # (R, 1)
    scores, greedy = _at(after_trunk[rows].unsqueeze(1), first, valid)
    scores, greedy = scores + trunk_scores[rows], greedy & trunk_greedy[rows]

    longer = [number for number, branch in enumerate(branches) if len(branch) > 1]
    if longer:
        rows = rows[longer]
        cache.batch_select_indices(rows)
        ids, valid = pad([branches[number][:-1] for number in longer], pad_id, "right", device)
        targets, _ = pad([branches[number][1:] for number in longer], pad_id, "right", device)
        extended = torch.cat([mask[rows], valid], dim=1)
        with adapted.voting(torch.zeros_like(valid)):  # also where each new token could vote
            out = call(
                adapted.model,
                input_ids=ids,
                attention_mask=extended,
                position_ids=position_ids(extended)[:, mask.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            )
        rest_scores, rest_greedy = _at(_log_probs(out.logits), targets, valid)
        scores[longer] += rest_scores
        greedy[longer] &= rest_greedy
    results = map(Likelihood, scores.tolist(), greedy.tolist())
    return [[next(results) for _ in query.branches] for query in queries]


def _at(log_probs: Tensor, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Sum log-probabilities (R, S, V) at the valid ones of tokens (R, S), in float64 (R,); and
    whether each of these tokens is the likeliest one (R,).
    """
    chosen = log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).double()
    greedy = (log_probs.argmax(-1) == tokens) | (valid == 0)
    return (chosen * valid).sum(1), greedy.all(1)


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
