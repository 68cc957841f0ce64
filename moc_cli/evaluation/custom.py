"""A person's own texts: the perplexity of what is to be learned, and outputs that match exactly.

Only given tokens vote on routes; a vote of tokens that are then predicted would tell what comes:

    instruction  the prompt votes
    chat         all before the assistant's first answer votes, for the later answers too, as in a
                 talk that goes on with the routes it began with
    text         nothing is given but the first token of each row (often the begin token), and it
                 alone votes. In training all tokens vote, so the two differ most here.

An output is generated greedily from the prompt, with one token more than the longest right output
has, and matches if it is the right one but for white space at both ends.
"""

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from moc_cli.data.batches import pad_token_id
from moc_cli.data.encode import Encoded, encode_train
from moc_cli.data.examples import ChatExample, Example, InstructionExample, TextExample
from moc_cli.recipe.schema import DataSection
from moc_cli.scoring import metrics
from moc_cli.scoring.batch_size import Asked, BatchSize, Shape, run_batches
from moc_cli.scoring.forward import Progress, Scorable, check_fits, evaluating, pad_left
from moc_cli.scoring.generate import settings
from moc_cli.scoring.loss import TextScore, lm_loss
from moc_cli.scoring.results import Evaluation, TaskResult

VOTERS = {
    "instruction": "the prompt",
    "chat": "all before the first answer",
    "text": "the first token of each row",
}


def protocol_of(data: DataSection, asked: str) -> str:
    """Return how a run is scored: by the protocol `asked` for where there are options to choose
    from; `classify` and, for one's own texts, `texts` have no other.
    """
    if data.suite == "glue" or data.format in ("classification", "regression"):
        return "classify"
    return "texts" if data.suite == "custom" else asked


def votes_of(data: DataSection) -> dict[str, str]:
    """Return what results.json says of the tokens that voted when one's own texts were scored."""
    return {"votes": VOTERS[data.format]} if data.format in VOTERS else {}


def is_written(examples: Sequence[Example]) -> bool:
    """Whether examples are one's own texts, which `evaluate_texts` scores."""
    return bool(examples) and isinstance(
        examples[0], InstructionExample | ChatExample | TextExample
    )


def evaluate_texts(
    adapted: Scorable,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: Asked,
    max_length: int,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Score one's own texts: of instructions first the exact matches; of all, the perplexity.

    For the perplexity texts are cut to `max_length` tokens; prompts to be answered are not.
    """
    begin = time.perf_counter()
    size = BatchSize(batch_size)
    encoded = encode_learned(tokenizer, examples, max_length)
    held = lm_loss(adapted, tokenizer, encoded, batch_size=size, on_progress=on_progress)
    items = [TextScore(loss, tokens) for loss, tokens in held.rows]
    asked = cast(list[InstructionExample], examples)
    if isinstance(examples[0], InstructionExample):
        outputs = _generate(adapted, tokenizer, asked, size, on_progress)
        items = [
            TextScore(item.loss, item.tokens, example.output.strip(), output)
            for item, example, output in zip(items, asked, outputs, strict=True)
        ]
    seconds = time.perf_counter() - begin
    task, n = examples[0].task, len(items)
    found = metrics.perplexity(held.rows)
    results = [TaskResult(task, "perplexity", found.value, n, found.stderr, None, seconds)]
    if isinstance(examples[0], InstructionExample):
        results = [_matches(task, items, seconds), *results]
    return Evaluation(tuple(results), items, size)


def watch_texts(
    adapted: Scorable,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    batch_size: Asked,
    max_length: int,
    on_progress: Progress | None = None,
) -> dict[str, float]:
    """Return loss and perplexity of one's own texts; nothing is generated while a model trains."""
    encoded = encode_learned(tokenizer, examples, max_length)
    held = lm_loss(adapted, tokenizer, encoded, batch_size=batch_size, on_progress=on_progress)
    return {"loss": held.loss, "perplexity": math.exp(held.loss)}


def encode_learned(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int
) -> Encoded:
    """Encode texts with labels on answers alone, whatever training learned beside them."""
    return encode_train(examples, tokenizer, max_length=max_length, train_on_inputs=False)


def sample_fields(item: TextScore) -> dict[str, Any]:
    """Return what samples.jsonl says of a text."""
    told: dict[str, Any] = {"loss": item.loss, "tokens": item.tokens}
    if item.label is None:
        return told
    generated = {"label": item.label, "prediction": item.prediction, "correct": item.correct}
    return told | generated


def sample_prompt(example: Example) -> str:
    """Return the text that names an item by its hash."""
    if isinstance(example, InstructionExample):
        return example.prompt
    if isinstance(example, ChatExample):
        return "\n".join(f"{role}: {content}" for role, content in example.messages)
    return cast(TextExample, example).train_text


def _generate(
    adapted: Scorable,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[InstructionExample],
    size: BatchSize,
    on_progress: Progress | None,
) -> list[str]:
    """Write an output for every prompt, white space at its ends left out."""
    model = adapted.model
    texts = [example.prompt for example in examples]
    prompts = [list(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
    right = tokenizer([example.output for example in examples], verbose=False)["input_ids"]
    new = max(map(len, right)) + 1
    check_fits(model, max(map(len, prompts)) + new, "the longest prompt with the longest output")
    shapes = [Shape(len(prompt), new) for prompt in prompts]
    pad = pad_token_id(tokenizer)
    with (
        evaluating(model) as device,
        settings(model, tokenizer, beams=1, new_tokens=new),
    ):

        def work(items: list[int]) -> list[str]:
            ids, mask = pad_left([prompts[item] for item in items], pad, device)
            written = model.generate(input_ids=ids, attention_mask=mask)  # type: ignore[operator]
            decoded = tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            return [str(text).strip() for text in decoded]

        return run_batches(model, shapes, work, size=size, on_progress=on_progress)


def _matches(task: str, items: Sequence[TextScore], seconds: float) -> TaskResult:
    """Return the share of outputs that are the right ones; always giving one text is the base."""
    right = [item.correct is True for item in items]
    found = metrics.measure("accuracy", [1] * len(right), [int(one) for one in right])
    commonest = Counter(item.label for item in items).most_common(1)[0][1]
    best = commonest / len(items)
    return TaskResult(task, "exact_match", found.value, len(items), found.stderr, best, seconds)
