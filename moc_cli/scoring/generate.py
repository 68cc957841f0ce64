"""Multiple choice as LLM-Adapters scores it: write an answer, then look for an option word in it.

Four beams, no sampling, 32 new tokens, prompts padded on the left. A text without any option word
is wrong, and counted apart.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.data.examples import ANSWER, ChoiceExample
from moc_cli.methods import TextModel
from moc_cli.models.tokens import end_tokens, pad_token_id, prompt_ids
from moc_cli.scoring.batch_size import BatchSize, BatchSizeOption, RowCost, run_batches
from moc_cli.scoring.extract import extract, response
from moc_cli.scoring.forward import Limits, Progress, evaluating, pad

BEAMS = 4
NEW_TOKENS = 32


@dataclass(frozen=True)
class Answer:
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
        return {
            "label": self.label,
            "prediction": self.prediction,
            "correct": self.correct,
            "output": self.output,
            "answer": self.answer,
        }


def generate(
    model: TextModel,
    examples: Sequence[ChoiceExample],
    *,
    batch_size: BatchSizeOption | BatchSize,
    on_progress: Progress | None = None,
) -> list[Answer]:
    """Answer every question, in the order of the examples.

    Prompts are never cut: raises DataError where one leaves the model no room for 32 tokens more.
    """
    network: Any = model.adapted.model
    tokenizer = model.tokenizer
    texts = [example.eval_prompt for example in examples]
    prompts = prompt_ids(tokenizer, texts)
    limits = Limits.of(network)
    for example, prompt in zip(examples, prompts, strict=True):
        limits.check([prompt], f"{example.task}: a question with its answer", NEW_TOKENS)
    costs = [RowCost(len(prompt), NEW_TOKENS, BEAMS) for prompt in prompts]
    pad_id = pad_token_id(tokenizer)
    with evaluating(network) as device, settings(network, tokenizer):

        def work(items: list[int]) -> list[str]:
            ids, mask = pad([prompts[item] for item in items], pad_id, "left", device)
            written = network.generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :]
            return list(tokenizer.batch_decode(written, skip_special_tokens=True))

        texts = run_batches(model.adapted, costs, work, size=batch_size, on_progress=on_progress)
    return [_judge(example, text) for example, text in zip(examples, texts, strict=True)]


def answer_length(tokenizer: PreTrainedTokenizerBase, example: ChoiceExample) -> int:
    """Count the tokens of a question's prompt with its answer."""
    return len(prompt_ids(tokenizer, [example.eval_prompt])[0]) + NEW_TOKENS


def _judge(example: ChoiceExample, text: str) -> Answer:
    words = [candidate.removeprefix(ANSWER) for candidate in example.candidates]
    output = response(text)
    answer = extract(example.task, output, words)
    prediction = words.index(answer) if answer in words else None
    return Answer(example.label, prediction, output, answer)


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
    own = model.generation_config
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
        model.generation_config = own
