"""What a model takes, asked once before many rows are scored."""

import pytest
from support.messages import refused
from support.models import make_byte_tokenizer, make_tiny
from support.questions import MIXED

from moc_cli.data.examples import InstructionExample
from moc_cli.errors import DataError
from moc_cli.kinds import Choice, Instruction
from moc_cli.methods import TextModel, bare
from moc_cli.models.tokens import max_positions
from moc_cli.scoring.forward import Limits
from moc_cli.scoring.results import ScoringOptions

WRITTEN = [InstructionExample("t", "say" * number, "ja") for number in (1, 2, 3)]
SCORED = {"rank": (Choice(), MIXED), "generate": (Choice(), MIXED[:3])}
SCORED |= {"texts": (Instruction(), WRITTEN)}


@pytest.mark.parametrize("protocol", SCORED)
def test_the_modules_of_a_model_are_not_looked_at_for_each_row(protocol, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "moc_cli.scoring.forward.max_positions",
        lambda model: asked.append(model) or max_positions(model),
    )
    kind, rows = SCORED[protocol]
    model = TextModel(bare(make_tiny("llama")), make_byte_tokenizer())
    counts = []
    for part in (rows[:1], rows):
        asked.clear()
        kind.score(model, part, ScoringOptions(4, 500, protocol))
        counts.append(len(asked))
    assert counts[0] == counts[1] > 0


def test_the_last_position_and_the_last_token_are_taken():
    limits = Limits(positions=4, embeddings=10)
    limits.check([[9], [], [1, 2, 3]], "a row", new_tokens=1)
    Limits(None, 10).check([[1] * 99], "a row")
    with refused(DataError):
        limits.check([[1], [1, 2, 3]], "a row", new_tokens=2)
    with refused(DataError):
        limits.check([[1], [10]], "a row")
