"""Multiple choice as LLM-Adapters scores it: write an answer, then look for an option word in it.

Four beams, no sampling, 32 new tokens, prompts padded on the left. A text without any option word
is wrong, and counted apart.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.data.examples import ANSWER, ChoiceExample
from moc_cli.methods import TextModel
from moc_cli.models.tokens import end_tokens, max_positions, pad_token_id, prompt_ids
from moc_cli.scoring.batch_size import BatchSize, BatchSizeOption, RowCost, run_batches
from moc_cli.scoring.extract import extract, response
from moc_cli.scoring.forward import Limits, Progress, evaluating, pad

BEAMS = 4
NEW_TOKENS = 32


@dataclass(frozen=True)
class ExtractedAnswer:
    """One question: the right option, the one that was answered (None: no option of this row),
    the text, and the option word found in it (None: there is none).
    """

    label: int
    prediction: int | None
    output: str
    answer: str | None

    @property
    def correct(self) -> bool:
        """Whether the answered option is the right one."""
        return self.prediction == self.label

    def sample(self) -> dict[str, Any]:
        """Return what samples.jsonl says of the question."""
        return asdict(self) | {"correct": self.correct}


def generate(
    model: TextModel,
    examples: Sequence[ChoiceExample],
    *,
    batch_size: BatchSizeOption | BatchSize,
    on_progress: Progress | None = None,
) -> list[ExtractedAnswer]:
    """Answer every question, in the order of the examples.

    Prompts are never cut: raises DataError where one leaves the model no room for 32 tokens more.
    """
    prompts = prompt_ids(model.tokenizer, [example.eval_prompt for example in examples])
    limits = Limits.of(model.adapted.model)
    for example, prompt in zip(examples, prompts, strict=True):
        limits.check([prompt], f"{example.task}: a question with its answer", NEW_TOKENS)
    new = [NEW_TOKENS] * len(prompts)
    texts = write(model, prompts, new, beams=BEAMS, batch_size=batch_size, on_progress=on_progress)
    return [_judge(example, text) for example, text in zip(examples, texts, strict=True)]


def write(
    model: TextModel,
    prompts: Sequence[list[int]],
    new: Sequence[int],
    *,
    beams: int = 1,
    batch_size: BatchSizeOption | BatchSize,
    on_progress: Progress | None = None,
    options: Callable[[int], dict[str, Any]] = lambda length: {},
) -> list[str]:
    """Continue every prompt by at most its number of `new` tokens; return the texts.

    Prompts are padded on the left. `options` are more arguments of transformers' `generate`, for
    a batch whose prompts have this length.
    """
    network: Any = model.adapted.model
    tokenizer, limit = model.tokenizer, max_positions(network)
    ends = end_tokens(network, tokenizer)
    costs = [
        RowCost(len(prompt), new_tokens, beams)
        for prompt, new_tokens in zip(prompts, new, strict=True)
    ]
    with evaluating(network) as device:

        def work(items: list[int]) -> list[str]:
            new_tokens = max(new[item] for item in items)
            longest = max(len(prompts[item]) for item in items)
            if limit is not None and longest + new_tokens > limit and len(items) > 1:
                # The longest prompt is another row's than the longest output: apart they fit.
                half = len(items) // 2
                return work(items[:half]) + work(items[half:])
            rows = [prompts[item] for item in items]
            ids, mask = pad(rows, pad_token_id(tokenizer), "left", device)
            with settings(network, tokenizer, beams=beams, new_tokens=new_tokens):
                written = network.generate(
                    input_ids=ids, attention_mask=mask, **options(ids.shape[1])
                )
            texts = zip(written[:, ids.shape[1] :].tolist(), items, strict=True)
            new_ids = [_until_the_end(tokens[: new[item]], ends) for tokens, item in texts]
            return list(tokenizer.batch_decode(new_ids, skip_special_tokens=True))

        return run_batches(model.adapted, costs, work, size=batch_size, on_progress=on_progress)


def _until_the_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Leave out what fills a row that has ended: it may be any token."""
    places = (place for place, token in enumerate(tokens, 1) if token in ends)
    return tokens[: next(places, len(tokens))]


def answer_length(tokenizer: PreTrainedTokenizerBase, example: ChoiceExample) -> int:
    """Count the tokens of a question's prompt with its answer."""
    return len(prompt_ids(tokenizer, [example.eval_prompt])[0]) + NEW_TOKENS


def _judge(example: ChoiceExample, text: str) -> ExtractedAnswer:
    option_words = [candidate.removeprefix(ANSWER) for candidate in example.candidates]
    output = response(text)
    answer = extract(example.task, output, option_words)
    prediction = option_words.index(answer) if answer in option_words else None
    return ExtractedAnswer(example.label, prediction, output, answer)


@contextmanager
def settings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    beams: int = BEAMS,
    new_tokens: int = NEW_TOKENS,
) -> Iterator[None]:
    """Within it the model generates without sampling, whatever its checkpoint prefers; by default
    as LLM-Adapters does.

    transformers takes every setting that a call leaves open from the model's own ones, such as a
    penalty for repetitions; only its end tokens are kept, beside the one that training appends.
    """
    own_config = model.generation_config
    model.generation_config = GenerationConfig(
        num_beams=beams,
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=end_tokens(model, tokenizer) or None,
        pad_token_id=pad_token_id(tokenizer),
    )
    try:
        yield
    finally:
        model.generation_config = own_config
