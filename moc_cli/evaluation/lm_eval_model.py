"""An adapted model under lm-evaluation-harness's own model class, with our rules for routes.

Only a request's context votes on its route, and padding never does, whatever the batch. Requests of
one context (the answers of a question) are scored together and share its computation.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from moc_cli.errors import DataError
from moc_cli.methods import TextModel
from moc_cli.models.tokens import max_positions, pad_token_id, prompt_ids
from moc_cli.scoring.batch_size import BatchSize, BatchSizeOption
from moc_cli.scoring.generate import write
from moc_cli.scoring.likelihood import Likelihood, Query, Tokens, likelihoods

Observe = Callable[[str, int, int], None]  # kind of request, requests done, requests in all
UNKNOWN_LENGTH = 2048  # tokens taken by a model that does not say how many positions it has
SHARED = 16  # answers of one context in a batch item at most: each may take a row of the cache
NEW_TOKENS = 256  # where a task sets no limit


class MocLM(TemplateLM):  # type: ignore[misc]  # lm_eval is not typed
    """Answers lm_eval's three kinds of requests: likelihoods, rolling likelihoods, generation.

    `batch` holds the batch size used. `cut` counts contexts of which the beginning was dropped
    because the model has too few positions; answers are never cut.
    """

    def __init__(
        self,
        model: TextModel,
        *,
        batch_size: BatchSizeOption = "auto",
        observe: Observe | None = None,
    ) -> None:
        super().__init__()
        self.text_model, self.tokenizer = model, model.tokenizer
        self.batch = BatchSize(batch_size)
        self.cut = 0
        self.max_length = max_positions(model.adapted.model) or UNKNOWN_LENGTH
        self._observe = observe
        self._pad_id = pad_token_id(model.tokenizer)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = self.tokenizer.eos_token_id
        return self._pad_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context: the one that begins texts, else ends them."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> Tokens:
        """Tokens of a text; by default with the special ones before it, unless it begins so."""
        begin = self.tokenizer.bos_token
        special = not (begin and string.startswith(begin))
        if add_special_tokens is not None:
            special = add_special_tokens
        if special:
            return prompt_ids(self.tokenizer, [string])[0]
        return list(self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Of (context, continuation): log p(continuation | context), and whether it is the text
        that greedy decoding would give. Raises DataError for an empty continuation.
        """
        if not all(continuation for _, continuation in (request.args for request in requests)):
            raise DataError("a request has no token to score: its continuation is empty")
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return scores

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, Tokens, Tokens]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score (texts, context, continuation), those of one context together."""
        places: dict[tuple[int, ...], list[int]] = {}
        for place, (_, context, _) in enumerate(requests):
            places.setdefault(tuple(context), []).append(place)
        groups = [
            group[first : first + SHARED]
            for group in places.values()
            for first in range(0, len(group), SHARED)
        ]
        queries = [
            self._query(requests[group[0]][1], [requests[place][2] for place in group])
            for group in groups
        ]
        scores = {
            place: (score.log_prob, score.greedy)
            for group, row in zip(groups, self._score(queries, "likelihoods"), strict=True)
            for place, score in zip(group, row, strict=True)
        }
        return [scores[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of (text,): log p(text), in windows of as many tokens as the model takes.

        What comes before a window's scored tokens votes on its route; in the first window that is
        the token that begins a text.
        """
        texts = [
            list(
                get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
                )
            )
            for request in requests
        ]
        windows = [make_disjoint_window(window) for text in texts for window in text]
        queries = [self._query(context, [tokens]) for context, tokens in windows]
        scores = (row[0].log_prob for row in self._score(queries, "texts"))
        return [sum(next(scores) for _ in text) for text in texts]

    def _query(self, context: Tokens, continuations: list[Tokens]) -> Query:
        """Cut a context at its beginning so that the longest continuation fits behind it."""
        longest = max(map(len, continuations))
        if longest > self.max_length:
            raise DataError(f"an answer has {longest} tokens, the model takes {self.max_length}")
        if not all(continuations):
            raise DataError("a request has no token to score: its continuation adds none")
        context = self._end(context or [self.prefix_token_id], longest - 1)
        return Query.of(context, continuations)

    def _end(self, context: Tokens, new_tokens: int) -> Tokens:
        """The end of a context that leaves room for `new_tokens` tokens."""
        room = self.max_length - new_tokens
        self.cut += len(context) > room
        return context[-room:]

    def _score(self, queries: list[Query], kind: str) -> list[list[Likelihood]]:
        return likelihoods(
            self.text_model,
            queries,
            batch_size=self.batch,
            on_progress=self._progress(kind),
        )

    def _progress(self, kind: str) -> Callable[[int, int], None]:
        return lambda done, total: self._observe and self._observe(kind, done, total)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Of (context, options): the text up to the first of the options' `until`.

        Raises DataError where a task wants as many new tokens as the model has positions.
        """
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(repr(sorted(request.args[1].items())), []).append(place)
        texts: dict[int, str] = {}
        for group in places.values():
            contexts = [requests[place].args[0] for place in group]
            written = self._generate(contexts, requests[group[0]].args[1])
            texts |= dict(zip(group, written, strict=True))
        return [texts[place] for place in range(len(requests))]

    def _generate(self, contexts: list[str], options: dict[str, Any]) -> list[str]:
        """Continue each context under one set of lm_eval's options."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(options, NEW_TOKENS))
        stops = [stop for stop in kwargs.pop("until", []) if stop]
        new = int(kwargs.pop("max_gen_toks"))
        if kwargs.get("do_sample") is False:
            kwargs.pop("temperature", None)
        if new >= self.max_length:
            raise DataError(
                f"a task asks for {new} new tokens, the model takes {self.max_length} in all"
            )
        prompts = [self._end(self.tok_encode(context), new) for context in contexts]

        def options_of(length: int) -> dict[str, Any]:
            stopping = StoppingCriteriaList([Stops(self.tokenizer, stops, length)])
            return kwargs | {"stopping_criteria": stopping}

        texts = write(
            self.text_model,
            prompts,
            [new] * len(prompts),
            batch_size=self.batch,
            on_progress=self._progress("answers"),
            options=options_of,
        )
        return [postprocess_generated_text(text, stops, None) for text in texts]


class Stops(StoppingCriteria):
    """A row has ended when one of the stops stands in the text after its prompt.

    Each row ends for itself, unlike lm_eval's own criterion; a stop that the prompt begins is none,
    unlike transformers'. Only the last tokens are read: a stop ends in the newest of them.
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
        # With special tokens: a stop may be one, such as the end of a turn.
        texts = self._tokenizer.batch_decode(new, skip_special_tokens=False)
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)
