"""A model as lm-evaluation-harness asks it: likelihoods of texts, and texts until a stop.

Only a request's context votes on its route, and padding never does, whatever the batch. Requests of
one context (the answers of a question) share its computation, and with it the route:

    context        on a key-value cache, padded on the left; its tokens vote
    continuations  the cache's rows are repeated for them; padded on the right; none of them votes

lm_eval itself is imported by nobody here: this is what it calls.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from moc_cli.data.batches import pad_token_id
from moc_cli.errors import DataError
from moc_cli.scoring.batch_size import Asked, BatchSize, Shape, run_batches
from moc_cli.scoring.forward import (
    Scorable,
    call,
    check_finite,
    evaluating,
    pad_left,
    pad_right,
    positions,
    voting,
)
from moc_cli.scoring.generate import settings

Tokens = list[int]
Observe = Callable[[str, int, int], None]  # kind of request, done, in all
UNKNOWN_LENGTH = 2048  # tokens taken by a model that does not say how many it can
SHARED = 16  # answers of one context in a batch at most: each is a row
NEW_TOKENS = 256  # where a task sets no limit


class HarnessModel:
    """Answers lm_eval's three kinds of requests; each request's `args` are what it asks.

    `size` tells the batches used. `cut` counts contexts of which the beginning was dropped because
    the model has too few positions; the answers always stay whole.
    """

    rank = 0
    world_size = 1

    def __init__(
        self,
        adapted: Scorable,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: Asked = "auto",
        observe: Observe | None = None,
    ) -> None:
        self.adapted, self.tokenizer = adapted, tokenizer
        self.size = BatchSize(batch_size)
        self.cut = 0
        self._observe = observe
        self._pad = pad_token_id(tokenizer)
        config: Any = adapted.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        self.max_length: int = UNKNOWN_LENGTH if limit is None else limit

    # Likelihoods

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of (context, continuation): log p(continuation | context), and whether it is the text
        that greedy decoding would give.
        """
        pairs = [self.split(*request.args) for request in requests]
        return self.score(pairs, "likelihoods")

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of (text,): log p(text), in windows of as many tokens as the model takes.

        A window's route is voted by what comes before its scored tokens; in the first one that is
        the token that begins a text.
        """
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows: list[tuple[Tokens, Tokens]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            found = get_rolling_token_windows(
                self.encode(text), self._first_token(), self.max_length, 1
            )
            own = [make_disjoint_window(window) for window in found]
            windows += own
            counts.append(len(own))
        scores = iter(self.score(windows, "texts", shared=1))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def split(self, context: str, continuation: str) -> tuple[Tokens, Tokens]:
        """Tokens of a context and of what follows it.

        As lm_eval does: blanks that end the context go to the continuation, which is what joint
        tokens leave after as many as the context has alone. An empty context is the first token.
        """
        kept = context.rstrip()
        before, after = kept, context[len(kept) :] + continuation
        if not before:
            first = self._first_token()
            answer = self.encode(after, special=False)
            start = [] if answer[:1] == [first] else [first]
            return start or answer[:1], answer if start else answer[1:]
        alone = self.encode(before)
        return alone, self.encode(before + after)[len(alone) :]

    def encode(self, text: str, *, special: bool = True) -> Tokens:
        """Tokens of a text, with the tokenizer's special ones unless they are there already."""
        begin = self.tokenizer.bos_token
        special = special and not (begin and text.startswith(begin))
        found = self.tokenizer(text, add_special_tokens=special, verbose=False)
        return list(found["input_ids"])

    def score(
        self, pairs: Sequence[tuple[Tokens, Tokens]], kind: str, *, shared: int = SHARED
    ) -> list[tuple[float, bool]]:
        """Score the second tokens of each pair after its first.

        Up to `shared` pairs of one context are computed together. Raises DataError for a pair
        without a context or an answer, and for an answer longer than the model; MocError where the
        outputs are no numbers.
        """
        self._check(pairs)
        groups = _by_context(pairs, shared)
        answers = [[pairs[place][1] for place in group] for group in groups]
        longest = [max(map(len, group)) for group in answers]
        contexts = [
            self._fitting(pairs[group[0]][0], most - 1)
            for group, most in zip(groups, longest, strict=True)
        ]
        shapes = [
            Shape(len(context), most - 1, len(group), logits=most)
            for context, most, group in zip(contexts, longest, groups, strict=True)
        ]
        with evaluating(self.adapted.model) as device:

            def work(items: list[int]) -> list[list[tuple[float, bool]]]:
                chosen = [contexts[item] for item in items], [answers[item] for item in items]
                return self._score(*chosen, device)

            found = self._batches(shapes, work, kind)
        scores: dict[int, tuple[float, bool]] = {}
        for group, results in zip(groups, found, strict=True):
            scores |= dict(zip(group, results, strict=True))
        check_finite([total for total, _ in scores.values()])
        return [scores[place] for place in range(len(pairs))]

    def _score(
        self, contexts: list[Tokens], answers: list[list[Tokens]], device: torch.device
    ) -> list[list[tuple[float, bool]]]:
        """Score each context's answers, all in one batch."""
        ids, mask = pad_left(contexts, self._pad, device)  # (B, T)
        out = call(
            self.adapted.model,
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=True,
            logits_to_keep=1,
        )
        pairs = [(row, answer) for row, group in enumerate(answers) for answer in group]
        rows = torch.tensor([row for row, _ in pairs], device=device)  # (R,)
        log_probs = _log_probs(out.logits[:, -1:])[rows]  # (R, 1, V)
        fed = [answer[:-1] for _, answer in pairs]
        if any(fed):
            cache = out.past_key_values
            cache.batch_select_indices(rows)
            more = self._feed(cache, mask[rows], fed)
            log_probs = torch.cat([log_probs, more], dim=1)  # (R, S, V)
        target, real = pad_right([answer for _, answer in pairs], 0, device)  # (R, S)
        chosen = log_probs.gather(-1, target.unsqueeze(-1)).squeeze(-1).double()
        totals = (chosen * real).sum(1).tolist()
        greedy = ((log_probs.argmax(-1) == target) | (real == 0)).all(1).tolist()
        results = iter(zip(totals, greedy, strict=True))
        return [[next(results) for _ in group] for group in answers]

    def _feed(self, cache: Any, mask: Tensor, fed: list[Tokens]) -> Tensor:
        """Log-probabilities after each of the tokens fed, (R, S, V); none of them votes."""
        ids, valid = pad_right(fed, self._pad, mask.device)
        extended = torch.cat([mask, valid], dim=1)
        with voting(self.adapted, torch.zeros_like(valid)):
            out = call(
                self.adapted.model,
                input_ids=ids,
                attention_mask=extended,
                position_ids=positions(extended)[:, mask.shape[1] :],
                past_key_values=cache,
                use_cache=True,
            )
        return _log_probs(out.logits)

    # Texts

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Of (context, options): the text up to the first of the options' `until`."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        texts: dict[int, str] = {}
        for places in groups.values():
            contexts = [requests[place].args[0] for place in places]
            written = self._write(contexts, requests[places[0]].args[1])
            texts |= dict(zip(places, written, strict=True))
        return [texts[place] for place in range(len(requests))]

    def _write(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        """Write after each context, with one set of lm_eval's options."""
        from lm_eval.models.utils import normalize_gen_kwargs

        known = dict(normalize_gen_kwargs(options, NEW_TOKENS))
        stops = [stop for stop in known.pop("until", []) if stop]
        new = int(known.pop("max_gen_toks"))
        if known.get("do_sample") is False:
            known.pop("temperature", None)
        if new >= self.max_length:
            raise DataError(
                f"a task asks for {new} new tokens, the model takes {self.max_length} in all"
            )
        prompts = [self._fitting(self.encode(context), new) for context in contexts]
        shapes = [Shape(len(prompt), new) for prompt in prompts]
        model: Any = self.adapted.model
        with evaluating(model) as device, settings(model, self.tokenizer, beams=1, new_tokens=new):

            def work(items: list[int]) -> list[str]:
                ids, mask = pad_left([prompts[item] for item in items], self._pad, device)
                ended = StoppingCriteriaList([Stops(self.tokenizer, stops, ids.shape[1])])
                out = model.generate(
                    input_ids=ids, attention_mask=mask, stopping_criteria=ended, **known
                )
                texts = self.tokenizer.batch_decode(
                    out[:, ids.shape[1] :], skip_special_tokens=True
                )
                return [until(text, stops) for text in texts]

            return self._batches(shapes, work, "answers")

    # What all share

    def _batches(self, shapes: list[Shape], work: Callable[[list[int]], list], kind: str) -> list:
        def observe(done: int, total: int) -> None:
            if self._observe is not None:
                self._observe(kind, done, total)

        return run_batches(self.adapted.model, shapes, work, size=self.size, on_progress=observe)

    def _fitting(self, context: Tokens, more: int) -> Tokens:
        """The end of a context that leaves room for `more` tokens."""
        room = self.max_length - more
        if len(context) <= room:
            return context
        self.cut += 1
        return context[-room:]

    def _first_token(self) -> int:
        """What stands before a text: the token that begins one, else the one that ends one."""
        known = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self._pad)
        return next(token for token in known if token is not None)

    def _check(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> None:
        for context, answer in pairs:
            if not context or not answer:
                raise DataError("a request has no token to score, or none to score it after")
            if len(answer) > self.max_length:
                raise DataError(
                    f"an answer has {len(answer)} tokens, the model takes {self.max_length}"
                )


class Stops(StoppingCriteria):
    """A row has ended when one of the stops stands in the text after its prompt.

    Only the last tokens are read: a stop that comes with a new token ends in it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], prompt: int
    ) -> None:
        self._tokenizer, self._stops, self._prompt = tokenizer, stops, prompt
        # A token may be a single byte; and the one before the stop may begin its first letter.
        self._tail = max((len(stop.encode()) for stop in stops), default=0) + 4

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return which rows have ended, (B,)."""
        new = input_ids[:, self._prompt :][:, -self._tail :]
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)


def _by_context(pairs: Sequence[tuple[Tokens, Tokens]], most: int) -> list[list[int]]:
    """Places of the pairs in groups of one context and at most `most` pairs."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (context, _) in enumerate(pairs):
        places.setdefault(tuple(context), []).append(place)
    return [
        group[first : first + most]
        for group in places.values()
        for first in range(0, len(group), most)
    ]


def until(text: str, stops: Sequence[str]) -> str:
    """The part of a text before the first of the stops."""
    places = [text.find(stop) for stop in stops]
    return text[: min((place for place in places if place >= 0), default=len(text))]


def _log_probs(logits: Tensor) -> Tensor:
    return logits.float().log_softmax(-1)
