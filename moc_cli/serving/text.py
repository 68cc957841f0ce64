"""One text after one prompt, token by token if wanted, and by the base model for comparison.

Prompts are answered one at a time, so that no answer depends on what else was asked.
"""

import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from moc_cli.data.batches import pad_token_id
from moc_cli.errors import DataError, MocError
from moc_cli.methods import Adapted
from moc_cli.report.output import printable
from moc_cli.scoring.forward import evaluating
from moc_cli.serving.prompts import Frame, Turn, encode

OnText = Callable[[str], None]
BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not one yet
JOINERS = "\u200c\u200d"  # they shape letters and emoji, and steer no terminal


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest, and draws nothing."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    num_beams: int = 1
    seed: int = 0

    def check(self) -> None:
        """Raise MocError for settings that contradict each other."""
        if self.num_beams > 1 and self.temperature > 0:
            raise MocError(
                f"--num-beams {self.num_beams} searches and --temperature {self.temperature:g} "
                "draws; one of them",
                "leave out --temperature for a beam search",
            )
        if self.top_p < 1 and self.temperature == 0:
            raise MocError(
                f"--top-p {self.top_p:g} has no effect at temperature 0", "add --temperature 0.7"
            )


@dataclass(frozen=True)
class Answer:
    """A generated text: its tokens and those of its prompt, the seconds, and whether it ended by
    itself rather than at the limit.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    ended: bool

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, the prompt's computation included."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Writer:
    """A model that answers: with its controls, or without them as the base it came from."""

    adapted: Adapted
    tokenizer: PreTrainedTokenizerBase
    frame: Frame = "raw"
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def turns(self, *contents: str) -> list[Turn]:
        """A conversation from its texts, the user's first; the system message before them."""
        roles = ("user", "assistant")
        said: list[Turn] = [
            {"role": roles[place % 2], "content": text} for place, text in enumerate(contents)
        ]
        return said if self.system is None else [{"role": "system", "content": self.system}, *said]

    def tokens(self, turns: Sequence[Turn]) -> list[int]:
        """The prompt's tokens; raises DataError for one that is empty or too long."""
        ids = encode(self.tokenizer, self.frame, turns)
        if not turns[-1]["content"].strip() or not ids:
            raise DataError("the prompt is empty", 'give a text: --prompt "..."')
        self.room(len(ids))
        return ids

    def room(self, length: int) -> int:
        """How many tokens may follow a prompt of `length`; raises DataError if none."""
        limit = positions(self.adapted.model)
        wanted = self.sampling.max_new_tokens
        if limit is None:
            return wanted
        if length >= limit:
            raise DataError(
                f"the prompt has {length} tokens, and the model takes {limit} with its answer"
            )
        return min(wanted, limit - length)

    def answer(
        self, turns: Sequence[Turn], on_text: OnText | None = None, *, base: bool = False
    ) -> Answer:
        """Answer the last turn; `on_text` gets the text as it comes (not in a beam search).

        With `base` the method is switched off. Every answer starts from the same seed.
        """
        ids = self.tokens(turns)
        if not base:
            return self._generate(ids, on_text)
        with self.adapted.disabled():
            return self._generate(ids, on_text)

    def _generate(self, ids: list[int], on_text: OnText | None) -> Answer:
        model, beams = self.adapted.model, self.sampling.num_beams
        ends = end_tokens(model, self.tokenizer)
        streamer = Pieces(self.tokenizer, on_text, ends) if on_text and beams == 1 else None
        with evaluating(model) as device, torch.random.fork_rng():
            torch.manual_seed(self.sampling.seed)
            prompt = torch.tensor([ids], device=device)
            begin = time.perf_counter()
            found = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                streamer=streamer,
                **self._options(self.room(len(ids)), ends),
            )[0, len(ids) :].tolist()
            seconds = time.perf_counter() - begin
        text = decode(self.tokenizer, [token for token in found if token not in ends])
        if on_text and streamer is None:
            on_text(text)
        ended = bool(found) and found[-1] in ends
        return Answer(text, len(ids), len(found), seconds, ended)

    def _options(self, room: int, ends: list[int]) -> dict[str, Any]:
        """Everything that changes the choice is given: a checkpoint may bring its own defaults."""
        draws = self.sampling.temperature > 0
        return {
            "max_new_tokens": room,
            "do_sample": draws,
            "temperature": self.sampling.temperature if draws else 1.0,
            "top_p": self.sampling.top_p if draws else 1.0,
            "top_k": 0 if draws else 50,  # 50 counts as not given; greedy search ignores it
            "repetition_penalty": 1.0,
            "num_beams": self.sampling.num_beams,
            "eos_token_id": ends or None,
            "pad_token_id": pad_token_id(self.tokenizer),
        }


class Pieces(BaseStreamer):
    """Hands on a generation's text as its tokens come; a part of a character waits for its rest.

    A token's text depends on those before it (blanks, letters of several tokens). Each new piece is
    what decoding adds to the piece before, so that the cost does not grow with the length.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: OnText, ends: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._on_text, self._ends = tokenizer, on_text, ends
        self._ids: list[int] = []
        self._known = 0  # of the tokens kept, how many have been handed on
        self._prompt = True

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then one token a call."""
        if self._prompt:
            self._prompt = False
            return
        self._ids += [token for token in value.flatten().tolist() if token not in self._ends]
        self._hand_on()

    def end(self) -> None:
        """Hand on what was still waiting."""
        self._hand_on(last=True)

    def _hand_on(self, last: bool = False) -> None:
        before = decode(self._tokenizer, self._ids[: self._known])
        whole = decode(self._tokenizer, self._ids)
        if len(whole) <= len(before) or (whole.endswith(BROKEN) and not last):
            return
        self._on_text(whole[len(before) :])
        self._ids = self._ids[self._known :]
        self._known = len(self._ids)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The tokens' text, without special tokens and with every blank kept."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a text: the checkpoint's and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    known = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*known, tokenizer.eos_token_id] if end is not None})


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for; None where it does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def harmless(text: str) -> str:
    """`text` with what could steer a terminal made visible; blanks of all kinds stay."""
    return "".join(
        char if char in "\t" + JOINERS or unicodedata.category(char) == "Zs" else printable(char)
        for char in text
    )
