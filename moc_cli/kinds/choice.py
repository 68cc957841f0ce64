"""Questions with options: the options are ranked by likelihood, or an answer is generated."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from moc_cli.data.encode import Row, common_prefix, prompt_tokens
from moc_cli.data.examples import ChoiceExample
from moc_cli.kinds.causal import Causal
from moc_cli.kinds.kind import Tokenizer
from moc_cli.methods import TextModel
from moc_cli.models.compiled_generation import compiled_generation
from moc_cli.models.tokens import may_exceed
from moc_cli.scoring import metrics
from moc_cli.scoring.batch_size import BatchSize
from moc_cli.scoring.forward import Progress
from moc_cli.scoring.generate import BEAMS, NEW_TOKENS, Answer, answer_length, generate
from moc_cli.scoring.rank import ItemScore, query_length, rank
from moc_cli.scoring.results import Evaluation, ScoringOptions, single_task

Questions = Sequence[ChoiceExample]


@dataclass(frozen=True)
class Choice(Causal):
    """Questions with options, answered by a language model; the prompt votes."""

    beams = BEAMS
    watched_by = "rank"

    def too_long(
        self, examples: Questions, tokenizer: Tokenizer, options: ScoringOptions, limit: int
    ) -> dict[int, int]:
        """Questions whose prompt with an option, or with a generated answer, is too long."""
        measure = answer_length if options.protocol == "generate" else query_length
        needed = {
            number: measure(tokenizer, example)
            for number, example in enumerate(examples)
            if may_exceed(
                [example.eval_prompt, max(example.candidates, key=len)], limit - NEW_TOKENS
            )
        }
        return {number: tokens for number, tokens in needed.items() if tokens > limit}

    def voters(self, examples: Questions, tokenizer: Tokenizer, max_length: int) -> list[Row]:
        """All that a question's candidates share with its prompt, which is never cut."""
        rows = []
        for example in examples:
            texts = prompt_tokens(tokenizer, example)
            shared = texts[0][: common_prefix(texts)]
            rows.append({"input_ids": shared, "labels": shared})
        return rows

    def score(
        self,
        model: TextModel,
        examples: Questions,
        options: ScoringOptions,
        on_progress: Progress | None = None,
    ) -> Evaluation:
        """Rank the options of a task's questions, or have answers generated: accuracy."""
        task = single_task(examples)
        begin = time.perf_counter()
        size = BatchSize(options.batch_size)
        items: list[ItemScore] | list[Answer]
        unparsed = None
        if options.protocol == "generate":
            with compiled_generation(model.adapted.model, options.torch_compile):
                items = generate(model, examples, batch_size=size, on_progress=on_progress)
            unparsed = sum(item.answer is None for item in items)
        else:
            items = rank(model, examples, batch_size=size, on_progress=on_progress)
        seconds = time.perf_counter() - begin
        # -1 marks an answer without an option: it equals no label.
        predictions = [-1 if item.prediction is None else item.prediction for item in items]
        labels, constant = [item.label for item in items], metrics.majority_choice(examples)
        score = metrics.measure("accuracy", labels, predictions, constant)
        return Evaluation(task, {"accuracy": score}, items, seconds, size, unparsed)

    def watch(
        self,
        model: TextModel,
        examples: Questions,
        options: ScoringOptions,
        on_progress: Progress | None = None,
    ) -> dict[str, float]:
        """Return the loss of the answers' tokens and the accuracy over all questions together.

        Questions are ranked whatever the protocol.
        """
        held_out = self.answer_loss(model, examples, options, on_progress)
        items = rank(model, examples, batch_size=options.batch_size, on_progress=on_progress)
        return {"loss": held_out.loss, "accuracy": sum(i.correct for i in items) / len(items)}

    def prompt(self, example: ChoiceExample) -> str:
        """The evaluation prompt."""
        return example.eval_prompt
