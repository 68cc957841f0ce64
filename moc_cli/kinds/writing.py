"""Texts to be written: the perplexity of what is to be learned, and outputs that match exactly.

An output is generated greedily from the prompt, with one token more than the right output has. It
matches if it is the right one but for white space at both ends.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from transformers import PreTrainedTokenizerBase

from moc_cli.data.custom.chat import chat_tokens
from moc_cli.data.encode import Row
from moc_cli.data.examples import ChatExample, InstructionExample, TextExample
from moc_cli.kinds.causal import Causal
from moc_cli.methods import TextModel
from moc_cli.models.compiled_generation import compiled_generation
from moc_cli.models.tokens import may_exceed, pad_token_id, prompt_ids
from moc_cli.recipe.sections import DataSection
from moc_cli.scoring import metrics
from moc_cli.scoring.batch_size import BatchSize, RowCost, run_batches
from moc_cli.scoring.forward import Limits, Progress, evaluating, pad
from moc_cli.scoring.generate import settings
from moc_cli.scoring.loss import TextScore, lm_loss
from moc_cli.scoring.results import Evaluation, Score, ScoringOptions, single_task

VOTERS = {
    "instruction": "the prompt",
    "chat": "all before the first answer",
    "text": "the first token of each row",
}


@dataclass(frozen=True)
class Writing(Causal):
    """Texts of one format: instruction, chat or text.

    Only given tokens vote on routes: a route chosen by tokens that are then predicted would
    give them away:

        instruction  the prompt votes
        chat         all before the assistant's first answer votes, for the later answers too, as
                     in a conversation that goes on with the routes it began with
        text         nothing is given but the first token of each row (often the begin token), and
                     it alone votes. In training all tokens vote, so the two differ most here.
    """

    beams = 1

    format: str

    @classmethod
    def of(cls, data: DataSection) -> Self:
        """Texts in the format of the rows."""
        return cls(data.kind.name)

    @property
    def facts(self) -> dict[str, Any]:
        """Which tokens vote when texts are scored."""
        return {"votes": VOTERS[self.format]}

    def too_long(
        self,
        examples: Sequence[Any],
        tokenizer: PreTrainedTokenizerBase,
        options: ScoringOptions,
        limit: int,
    ) -> dict[int, int]:
        """Instructions whose own prompt and output are too long together; other texts are cut."""
        if self.format != "instruction":
            return {}
        long = [
            number
            for number, row in enumerate(examples)
            if isinstance(row, ChatExample) or may_exceed([row.prompt, row.output], limit)
        ]
        requests = make_requests(tokenizer, [examples[number] for number in long])
        lengths = [len(request.prompt) + request.new for request in requests]
        return {n: length for n, length in zip(long, lengths, strict=True) if length > limit}

    def voters(
        self, examples: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[Row]:
        """What comes before the answer, or where nothing does the first token."""
        encoded = self.encode_answers(examples, tokenizer, max_length)
        pairs = zip(encoded.rows, encoded.prompt_lengths, strict=True)
        prompts = [row["input_ids"][:length] for row, length in pairs]
        return [{"input_ids": prompt, "labels": prompt} for prompt in prompts]

    def score(
        self,
        model: TextModel,
        examples: Sequence[Any],
        options: ScoringOptions,
        on_progress: Progress | None = None,
    ) -> Evaluation:
        """Score texts: of instructions first the exact matches; of all, the perplexity.

        For the perplexity texts are cut to `max_length` tokens; prompts to be answered are not.
        """
        task = single_task(examples)
        begin = time.perf_counter()
        size = BatchSize(options.batch_size)
        encoded = self.encode_answers(examples, model.tokenizer, options.max_length)
        held_out = lm_loss(model, encoded, batch_size=size, on_progress=on_progress)
        items = [TextScore(loss, tokens) for loss, tokens in held_out.rows]
        if self.format == "instruction":
            requests = make_requests(model.tokenizer, examples)
            with compiled_generation(model.adapted.model, options.torch_compile):
                outputs = _generate(model, requests, size, on_progress)
            items = [
                TextScore(item.loss, item.tokens, request.output, output)
                for item, request, output in zip(items, requests, outputs, strict=True)
            ]
        seconds, n = time.perf_counter() - begin, len(items)
        measure = metrics.perplexity(held_out.rows)
        scores = {"perplexity": Score(measure.value, measure.stderr, None, n)}
        if self.format == "instruction":
            measure = metrics.measure("accuracy", [1] * n, [int(i.correct is True) for i in items])
            # What always giving the most frequent output would score.
            majority = Counter(item.label for item in items).most_common(1)[0][1] / n
            exact = Score(measure.value, measure.stderr, majority, n)
            scores = {"exact_match": exact} | scores
        return Evaluation(task, scores, items, seconds, size)

    def watch(
        self,
        model: TextModel,
        examples: Sequence[Any],
        options: ScoringOptions,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        """Return loss and perplexity; nothing is generated while a model trains."""
        held_out = self.answer_loss(model, examples, options, on_progress)
        return {"loss": held_out.loss, "perplexity": math.exp(held_out.loss)}

    def prompt(self, example: InstructionExample | ChatExample | TextExample) -> str:
        """The prompt, or the text or conversation itself where there is none."""
        if isinstance(example, InstructionExample):
            return example.prompt
        if isinstance(example, ChatExample):
            return "\n".join(f"{role}: {content}" for role, content in example.messages)
        return example.train_text


class Request(NamedTuple):
    """The tokens of a prompt, the output that is right, and how many tokens may be written."""

    prompt: list[int]
    output: str
    new: int


def make_requests(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[InstructionExample | ChatExample]
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


def _chat_request(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], learned: list[bool]
) -> Request:
    """Cut a conversation at its answer, which is right as the chat template writes it."""
    first = learned.index(True)
    answer = ids[first:]
    text = str(tokenizer.decode(answer, skip_special_tokens=True)).strip()
    return Request(ids[:first], text, sum(learned))


def _generate(
    model: TextModel,
    requests: Sequence[Request],
    size: BatchSize,
    on_progress: Progress | None,
) -> list[str]:
    """Write an output for every prompt, white space at its ends left out.

    A row writes as many tokens as its own right output has, and one to end with.
    """
    network: Any = model.adapted.model
    tokenizer = model.tokenizer
    prompts = [request.prompt for request in requests]
    new = [request.new for request in requests]
    limits = Limits.of(network)
    for prompt, count in zip(prompts, new, strict=True):
        limits.check([prompt], "a prompt with its output", count)
    costs = [RowCost(*lengths) for lengths in zip(map(len, prompts), new, strict=True)]
    limit, pad_id = limits.positions, pad_token_id(tokenizer)
    with evaluating(network) as device:

        def work(items: list[int]) -> list[str]:
            most = max(new[item] for item in items)
            longest = max(len(prompts[item]) for item in items)
            if limit is not None and longest + most > limit and len(items) > 1:
                # The longest prompt is another row's than the longest output: apart they fit.
                half = len(items) // 2
                return work(items[:half]) + work(items[half:])
            ids, mask = pad([prompts[item] for item in items], pad_id, "left", device)
            with settings(network, tokenizer, beams=1, new_tokens=most):
                written = network.generate(input_ids=ids, attention_mask=mask)
            rows = zip(written[:, ids.shape[1] :].tolist(), items, strict=True)
            own = [tokens[: new[item]] for tokens, item in rows]
            decoded = tokenizer.batch_decode(own, skip_special_tokens=True)
            return [str(text).strip() for text in decoded]

        return run_batches(model.adapted, costs, work, size=size, on_progress=on_progress)
