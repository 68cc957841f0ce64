"""The answer to one prompt, streamed on request, and the base model's answer for comparison.

Prompts are answered one at a time, so that no answer depends on the other prompts.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer

from moc_cli.data.custom.chat import answer_ends
from moc_cli.errors import DataError
from moc_cli.methods import TextModel
from moc_cli.models.tokens import end_tokens, max_positions
from moc_cli.recipe.tasks import Frame
from moc_cli.report.characters import printable
from moc_cli.scoring.forward import evaluating
from moc_cli.scoring.generate import settings
from moc_cli.serving.options import Sampling
from moc_cli.serving.prompts import Message, encode

OnText = Callable[[str], None]
JOINERS = "\u200c\u200d"  # they shape letters and emoji, and steer no terminal


@dataclass(frozen=True)
class GeneratedText:
    """A generated text, its number of tokens and the prompt's, the seconds that it took, and
    whether it `ended` with an end token rather than at the limit.
    """

    text: str
    prompt_tokens: int
    tokens: int
    seconds: float
    ended: bool

    @property
    def tokens_per_second(self) -> float:
        """New tokens per second, prefill included."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Writer(TextModel):
    """A model that answers prompts, with its controls or as its base model.

    `template` is the recipe's, of the frame `instruction`.
    """

    frame: Frame = "raw"
    template: str = "alpaca"
    system: str | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def messages(self, *texts: str) -> list[Message]:
        """Return a conversation of these texts, the user's first, after the system message."""
        system: list[Message] = []
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        roles: tuple[Literal["user", "assistant"], ...] = ("user", "assistant")
        return system + [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]

    def tokens(self, messages: Sequence[Message]) -> list[int]:
        """Return the prompt's tokens; raises DataError where it is empty or too long."""
        ids = encode(self.tokenizer, self.frame, messages, self.template)
        if not messages[-1]["content"].strip() or not ids:
            raise DataError("the prompt is empty", 'give a text: --prompt "..."')
        self.room(len(ids))
        return ids

    def room(self, length: int) -> int:
        """How many tokens may follow a prompt of `length`; raises DataError if none."""
        limit = max_positions(self.adapted.model)
        requested = self.sampling.max_new_tokens
        if limit is None:
            return requested
        if length >= limit:
            raise DataError(
                f"the prompt has {length} tokens, and the model takes {limit} with its answer"
            )
        return min(requested, limit - length)

    def answer(
        self, messages: Sequence[Message], on_text: OnText | None = None, *, base: bool = False
    ) -> GeneratedText:
        """Answer the last message; `on_text` gets the text as it comes (of a beam search, at once).

        With `base` the method is switched off. Every answer starts from the same seed.
        """
        ids = self.tokens(messages)
        if not base:
            return self._generate(ids, on_text)
        with self.adapted.disabled():
            return self._generate(ids, on_text)

    def _generate(self, ids: list[int], on_text: OnText | None) -> GeneratedText:
        model: Any = self.adapted.model
        ends = end_tokens(model, self.tokenizer)
        if self.frame == "chat":
            ends += [end for end in answer_ends(self.tokenizer) if end not in ends]
        streamer = (
            AnswerStreamer(self.tokenizer, on_text, ends)
            if on_text and self.sampling.num_beams == 1
            else None
        )
        with evaluating(model) as device, torch.random.fork_rng():
            torch.manual_seed(self.sampling.seed)
            prompt = torch.tensor([ids], device=device)
            begin = time.perf_counter()
            beams, room = self.sampling.num_beams, self.room(len(ids))
            with settings(model, self.tokenizer, beams=beams, new_tokens=room):
                tokens = model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=streamer,
                    eos_token_id=ends or None,
                    **self._draw(),
                )[0, len(ids) :].tolist()
            seconds = time.perf_counter() - begin
        text = decode(self.tokenizer, [token for token in tokens if token not in ends])
        if on_text and streamer is None:
            on_text(text)
        ended = bool(tokens) and tokens[-1] in ends
        return GeneratedText(text, len(ids), len(tokens), seconds, ended)

    def _draw(self) -> dict[str, Any]:
        """Return how the next token is chosen; nothing for the likeliest one."""
        if not self.sampling.temperature:
            return {}
        chosen = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
        return {"do_sample": True, "top_k": 0} | chosen


class AnswerStreamer(TextStreamer):
    """Passes the text of an answer on, word by word, without the prompt and special tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, on_text: OnText, ends: Sequence[int] = ()
    ) -> None:
        super().__init__(
            tokenizer,
            skip_prompt=True,
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        self._on_text = on_text
        special = (id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special)
        self._hidden = {*ends, *special}

    def put(self, value: Tensor) -> None:
        """Take the prompt, and then one token per call."""
        if self.next_tokens_are_prompt:
            super().put(value)  # type: ignore[no-untyped-call]
        elif value.item() not in self._hidden:
            super().put(value)  # type: ignore[no-untyped-call]
            if not self.token_cache:
                # A line has ended. Its last token stays: a SentencePiece decoder drops the blank
                # before a text's first word, which the next line would lose.
                self.token_cache = value.tolist()
                self.print_len = len(decode(self.tokenizer, self.token_cache))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on text that later tokens cannot change."""
        if text:
            self._on_text(text)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the tokens' text, without special tokens and with every blank."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def harmless(text: str) -> str:
    """`text` with what could steer a terminal made visible; tabs and joiners stay."""
    return "".join(char if char in "\t" + JOINERS else printable(char) for char in text)


def write(text: str) -> None:
    """Write a part of an answer to stdout at once."""
    sys.stdout.write(harmless(text))
    sys.stdout.flush()
