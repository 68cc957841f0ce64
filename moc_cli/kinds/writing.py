"""Texts to be written: the perplexity of what is to be learned."""

from collections.abc import Sequence
from typing import Any

from moc_cli.data.encode import Row
from moc_cli.data.examples import ChatExample, InstructionExample, TextExample
from moc_cli.kinds.causal import Causal
from moc_cli.kinds.kind import Examples, Observe, Tokenizer
from moc_cli.methods import TextModel
from moc_cli.scoring import metrics
from moc_cli.scoring.loss import TextScore
from moc_cli.scoring.metrics import Score
from moc_cli.scoring.results import ScoringOptions


class Writing(Causal):
    """Texts to be written: conversations, or one of the kinds below.

    Only given tokens vote on routes: a route chosen by tokens that are then predicted would
    give them away. Of a conversation, all before the assistant's first answer votes, for the later
    answers too, as where it goes on with the routes it began with.
    """

    votes = "all before the first answer"

    @property
    def facts(self) -> dict[str, Any]:
        """Which tokens vote when texts are scored."""
        return {"votes": self.votes}

    def voters(self, examples: Examples, tokenizer: Tokenizer, max_length: int) -> list[Row]:
        """What comes before the answer, or where nothing does the first token."""
        encoded = self.encode_answers(examples, tokenizer, max_length)
        pairs = zip(encoded.rows, encoded.prompt_lengths, strict=True)
        prompts = [row["input_ids"][:length] for row, length in pairs]
        return [{"input_ids": prompt, "labels": prompt} for prompt in prompts]

    def score_items(
        self, model: TextModel, examples: Examples, options: ScoringOptions, observe: Observe = None
    ) -> Sequence[TextScore]:
        """Compute the losses of texts, cut to `max_length` tokens."""
        held_out = self.answer_loss(model, examples, options, observe)
        return [TextScore(loss, tokens) for loss, tokens in held_out.rows]

    def measure(self, items: Sequence[TextScore], examples: Examples) -> dict[str, Score]:
        """The perplexity."""
        return {"perplexity": metrics.perplexity([(item.loss, item.tokens) for item in items])}

    def watch(
        self, model: TextModel, examples: Examples, options: ScoringOptions, observe: Observe = None
    ) -> dict[str, float]:
        """Return loss and perplexity; nothing is generated while a model trains."""
        held_out = self.answer_loss(model, examples, options, observe)
        return {"loss": held_out.loss, "perplexity": metrics.exp(held_out.loss)}

    def prompt(self, example: InstructionExample | ChatExample | TextExample) -> str:
        """The prompt, or the text or conversation itself where there is none."""
        if isinstance(example, InstructionExample):
            return example.prompt
        if isinstance(example, ChatExample):
            return "\n".join(f"{role}: {content}" for role, content in example.messages)
        return example.train_text


class PlainText(Writing):
    """Plain texts: nothing is given but the first token of each row (often the begin token), and it
    alone votes. In training all tokens vote, so the two differ most here.
    """

    votes = "the first token of each row"
