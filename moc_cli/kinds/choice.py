"""Questions with options: the options are ranked by likelihood, or an answer is generated."""

from collections.abc import Sequence
from dataclasses import dataclass

from moc_cli.data.encode import Row, common_prefix, prompt_tokens
from moc_cli.data.examples import ChoiceExample
from moc_cli.kinds.causal import Causal
from moc_cli.kinds.kind import Observe, Tokenizer
from moc_cli.methods import TextModel
from moc_cli.models.compiled_generation import compiled_generation
from moc_cli.models.tokens import may_exceed
from moc_cli.scoring import metrics
from moc_cli.scoring.generate import BEAMS, NEW_TOKENS, ExtractedAnswer, answer_length, generate
from moc_cli.scoring.metrics import Score
from moc_cli.scoring.rank import ItemScore, query_length, rank
from moc_cli.scoring.results import ScoringOptions

Choices = Sequence[ChoiceExample]


@dataclass(frozen=True)
class Choice(Causal):
    """Questions with options, answered by a language model; the prompt votes."""

    beams = BEAMS
    watched_by = "rank"

    def too_long(
        self, examples: Choices, tokenizer: Tokenizer, options: ScoringOptions, limit: int
    ) -> dict[int, int]:
        """Questions whose prompt with an option, or with a generated answer, is too long."""
        measure = answer_length if options.protocol == "generate" else query_length
        token_counts = {
            number: measure(tokenizer, example)
            for number, example in enumerate(examples)
            if may_exceed(
                [example.eval_prompt, max(example.candidates, key=len)], limit - NEW_TOKENS
            )
        }
        return {number: tokens for number, tokens in token_counts.items() if tokens > limit}

    def voters(self, examples: Choices, tokenizer: Tokenizer, max_length: int) -> list[Row]:
        """All that a question's candidates share with its prompt, which is never cut."""
        rows = []
        for example in examples:
            texts = prompt_tokens(tokenizer, example)
            shared = texts[0][: common_prefix(texts)]
            rows.append({"input_ids": shared, "labels": shared})
        return rows

    def score_items(
        self, model: TextModel, examples: Choices, options: ScoringOptions, observe: Observe = None
    ) -> Sequence[ItemScore | ExtractedAnswer]:
        """Rank the options of questions, or have answers generated."""
        size = options.batch_size
        if options.protocol != "generate":
            return rank(model, examples, batch_size=size, on_progress=observe)
        with compiled_generation(model.adapted.model, options.torch_compile):
            return generate(model, examples, batch_size=size, on_progress=observe)

    def measure(
        self, items: Sequence[ItemScore | ExtractedAnswer], examples: Choices
    ) -> dict[str, Score]:
        """The accuracy."""
        # -1 marks an answer without an option: it equals no label.
        predictions = [-1 if item.prediction is None else item.prediction for item in items]
        labels, constant = [item.label for item in items], metrics.majority_choice(examples)
        return {"accuracy": metrics.measure("accuracy", labels, predictions, constant)}

    def watch(
        self, model: TextModel, examples: Choices, options: ScoringOptions, observe: Observe = None
    ) -> dict[str, float]:
        """Return the loss of the answers' tokens and the accuracy over all questions together.

        Questions are ranked whatever the protocol.
        """
        held_out = self.answer_loss(model, examples, options, observe)
        items = rank(model, examples, batch_size=options.batch_size, on_progress=observe)
        return {"loss": held_out.loss, "accuracy": sum(i.correct for i in items) / len(items)}

    def prompt(self, example: ChoiceExample) -> str:
        """The evaluation prompt."""
        return example.eval_prompt
