"""Instructions with an output: the outputs that match exactly, beside the perplexity.

An output is generated greedily from the prompt, with one token more than the right output has. It
matches if it is the right one but for white space at both ends.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from moc_cli.data.custom.chat import chat_tokens
from moc_cli.data.examples import ChatExample, InstructionExample
from moc_cli.kinds.kind import Examples, Observe, Tokenizer
from moc_cli.kinds.writing import Writing
from moc_cli.methods import TextModel
from moc_cli.models.compiled_generation import compiled_generation
from moc_cli.models.tokens import may_exceed, prompt_ids
from moc_cli.scoring import metrics
from moc_cli.scoring.forward import Limits
from moc_cli.scoring.generate import write
from moc_cli.scoring.loss import TextScore
from moc_cli.scoring.metrics import Score
from moc_cli.scoring.results import ScoringOptions


class Instruction(Writing):
    """Instructions, in a prompt or by the chat template; the prompt votes."""

    beams = 1
    votes = "the prompt"

    def too_long(
        self, examples: Examples, tokenizer: Tokenizer, options: ScoringOptions, limit: int
    ) -> dict[int, int]:
        """Rows whose own prompt and output are too long together."""
        long = [
            number
            for number, row in enumerate(examples)
            if isinstance(row, ChatExample) or may_exceed([row.prompt, row.output], limit)
        ]
        requests = make_requests(tokenizer, [examples[number] for number in long])
        lengths = [len(request.prompt) + request.new for request in requests]
        return {n: length for n, length in zip(long, lengths, strict=True) if length > limit}

    def score_items(
        self, model: TextModel, examples: Examples, options: ScoringOptions, observe: Observe = None
    ) -> Sequence[TextScore]:
        """Compute losses, and have outputs written, for which prompts are not cut."""
        items = super().score_items(model, examples, options, observe)
        requests = make_requests(model.tokenizer, examples)
        with compiled_generation(model.adapted.model, options.torch_compile):
            outputs = _write(model, requests, options, observe)
        return [
            replace(item, label=request.output, prediction=output)
            for item, request, output in zip(items, requests, outputs, strict=True)
        ]

    def measure(self, items: Sequence[TextScore], examples: Examples) -> dict[str, Score]:
        """The outputs that match exactly, and the perplexity."""
        n = len(items)
        # What always giving the most frequent output would score.
        constant = Counter(item.label for item in items).most_common(1)[0][1] / n
        right = [int(item.correct is True) for item in items]
        exact = {"exact_match": metrics.measure("accuracy", [1] * n, right, constant)}
        return exact | super().measure(items, examples)


class Request(NamedTuple):
    """The tokens of a prompt, the output that is right, and how many tokens may be written."""

    prompt: list[int]
    output: str
    new: int


def make_requests(
    tokenizer: Tokenizer, examples: Sequence[InstructionExample | ChatExample]
) -> list[Request]:
    """Return what is asked and right in each row; a row may write one token more, to end with."""
    chats = [row for row in examples if isinstance(row, ChatExample)]
    if chats:
        return [_chat_request(tokenizer, *tokens) for tokens in chat_tokens(chats, tokenizer)]
    rows = [row for row in examples if isinstance(row, InstructionExample)]
    prompts = prompt_ids(tokenizer, [row.prompt for row in rows])
    outputs = prompt_ids(tokenizer, [row.output for row in rows])
    return [
        Request(prompt, row.output.strip(), len(output) + 1)
        for row, prompt, output in zip(rows, prompts, outputs, strict=True)
    ]


def _chat_request(tokenizer: Tokenizer, ids: list[int], learned: list[bool]) -> Request:
    """Cut a conversation at its answer, which is right as the chat template writes it."""
    first = learned.index(True)
    answer = ids[first:]
    text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
    return Request(ids[:first], text, sum(learned))


def _write(
    model: TextModel,
    requests: Sequence[Request],
    options: ScoringOptions,
    observe: Observe,
) -> list[str]:
    """Write an output for every prompt, white space at its ends left out.

    A row writes as many tokens as its own right output has, and one to end with.
    """
    prompts = [request.prompt for request in requests]
    new = [request.new for request in requests]
    limits = Limits.of(model.adapted.model)
    for prompt, count in zip(prompts, new, strict=True):
        limits.check([prompt], "a prompt with its output", count)
    texts = write(model, prompts, new, batch_size=options.batch_size, on_progress=observe)
    return [text.strip() for text in texts]
