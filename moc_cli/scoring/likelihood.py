"""Log-probabilities of continuations after a context, which alone votes on the route.

A query takes at most two forward passes on one key-value cache:

    context, trunk  the trunk is what all continuations begin with; padded on the left
    branches        what is left of each continuation; padded on the right. The cache's rows are
                    repeated for branches of several tokens; of a branch of one token nothing is
                    fed, and where all have one token nothing is cached

The score is the sum of the log-probabilities of trunk and branch, without an end token and not
normalised by length.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moc_cli.data.batches import pad_rows
from moc_cli.data.encode import common_prefix
from moc_cli.methods import Adapted, TextModel
from moc_cli.models.head import Head
from moc_cli.models.tokens import pad_token_id
from moc_cli.scoring.batch_size import BatchSize, BatchSizeOption, RowCost, run_batches
from moc_cli.scoring.forward import (
    Progress,
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
        """What the computation takes: a row of the cache for every branch that is fed."""
        copies = sum(len(branch) > 1 for branch in self.branches)
        longest = max(map(len, self.branches))
        fed = len(self.context) + len(self.trunk)
        return RowCost(fed, longest - 1, copies, logits=max(len(self.trunk) + 1, longest))


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
    head = Head(network)
    costs = [query.cost for query in queries]
    if any(cost.copies for cost in costs):  # what a batch caches, it caches for all its queries
        costs = [replace(cost, copies=max(1, cost.copies)) for cost in costs]
    if head.reason is None:
        costs = [replace(cost, logits=0) for cost in costs]
    with evaluating(network) as device:

        def score(items: list[int]) -> list[list[Likelihood]]:
            return _score(model.adapted, head, [queries[item] for item in items], pad_id, device)

        scores = run_batches(model.adapted, costs, score, size=batch_size, on_progress=on_progress)
    check_finite([score.log_prob for row in scores for score in row])
    return scores


def _score(
    adapted: Adapted, head: Head, queries: list[Query], pad_id: int, device: torch.device
) -> list[list[Likelihood]]:
    """Score a batch of B queries; everything is read from the device at the end."""
    ids, mask = pad([query.context + query.trunk for query in queries], pad_id, "left", device)
    last = 1 + max(len(query.trunk) for query in queries)
    branches = [
        (row, branch)
        for row, query in enumerate(queries)
        for branch in query.branches
        if len(branch) > 1
    ]
    with adapted.voting(prompt_mask(mask, [len(query.context) for query in queries])):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
        states, cache = head.run(inputs | {"use_cache": bool(branches)}, last=last)
    targets = _Targets()
    for row, query in enumerate(queries):
        end = (row + 1) * last - 1  # the position of the last token fed
        for number, token in enumerate(query.trunk):
            targets.add(end - len(query.trunk) + number, [token])
        targets.add(end, [branch[0] for branch in query.branches])
    begun, rest = targets.scores(head, states), None
    if branches:
        rows = torch.tensor([row for row, _ in branches], device=device)
        cache.batch_select_indices(rows)
        ids, valid = pad([branch[:-1] for _, branch in branches], pad_id, "right", device)
        extended = torch.cat([mask[rows], valid], dim=1)
        with adapted.voting(torch.zeros_like(valid)):  # also where each new token could vote
            positions = position_ids(extended)[:, mask.shape[1] :]
            inputs = {"input_ids": ids, "attention_mask": extended, "position_ids": positions}
            states, _ = head.run(inputs | {"past_key_values": cache, "use_cache": True})
        targets = _Targets()
        for number, (_, branch) in enumerate(branches):
            for place, token in enumerate(branch[1:], start=number * ids.shape[1]):
                targets.add(place, [token])
        rest = targets.scores(head, states)
    begins, ends = _on_host(begun), _on_host(rest) if rest else iter(())
    results = []
    for query in queries:
        trunk = [next(begins)[0] for _ in query.trunk]
        firsts = next(begins)  # as many as the branches, and filled up
        tails = [[next(ends)[0] for _ in branch[1:]] for branch in query.branches]
        tokens = ([*trunk, first, *tail] for first, tail in zip(firsts, tails, strict=False))
        results.append([Likelihood(sum(p for p, _ in t), all(g for _, g in t)) for t in tokens])
    return results


@dataclass
class _Targets:
    """The tokens to score after each of some positions of a batch, counted through all rows."""

    places: list[int] = field(default_factory=list)
    tokens: list[Tokens] = field(default_factory=list)

    def add(self, place: int, tokens: Tokens) -> None:
        self.places.append(place)
        self.tokens.append(tokens)

    def scores(self, head: Head, states: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and whether the token is the likeliest, (N, C) on the device; rows of
        fewer tokens than C are filled with any.
        """
        tokens = pad_rows(self.tokens, 0, "right")
        return head.log_probs(states, torch.tensor(self.places), tokens)


def _on_host(scores: tuple[Tensor, Tensor]) -> Iterator[list[tuple[float, bool]]]:
    """Yield for each position its pairs of log-probability and whether that is the highest."""
    for row in zip(*(part.tolist() for part in scores), strict=True):
        yield list(zip(*row, strict=True))
