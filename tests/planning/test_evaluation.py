"""The planned bytes of an evaluation: those that real scoring takes, batch by batch."""

from types import SimpleNamespace
from typing import Any

import pytest
from support.models import make_byte_tokenizer, make_tiny_model, tiny_config
from transformers import AutoModelForCausalLM, PreTrainedModel

from moc_cli.data.examples import ChoiceExample
from moc_cli.data.splits import Splits
from moc_cli.kinds import Choice
from moc_cli.methods import TextModel, attach
from moc_cli.models.tokens import max_positions
from moc_cli.planning.batches import Rows
from moc_cli.planning.evaluation import Scoring, score, scoring_of
from moc_cli.planning.fake_device import META, FakeDevice
from moc_cli.planning.live_memory import LiveMemory, PhasePart
from moc_cli.planning.plans import Planner
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.methods import MocMethod
from moc_cli.scoring.generate import generate
from moc_cli.scoring.rank import rank
from moc_cli.training import build

ROWS, TOKENS = 4, 60


def shapes() -> PreTrainedModel:
    with META:
        return AutoModelForCausalLM.from_config(tiny_config("llama"))


def peak(device: str, work: Any) -> int:
    with LiveMemory(device, lambda: PhasePart("all", "all")) as memory:
        work()
    return memory.peak


def questions(count: int, tokens: int) -> list[ChoiceExample]:
    """Questions of so many tokens; the last one is shorter, so that there is padding."""
    letters = tokens - len(make_byte_tokenizer()("").input_ids)
    prompts = ["x" * letters] * (count - 1) + ["x" * (letters // 2)]
    return [ChoiceExample("t", prompt, 0, prompt, ("a", "b"), 0) for prompt in prompts]


@pytest.mark.parametrize(("protocol", "beams"), [("rank", 0), ("generate", 4)])
def test_planned_bytes_are_those_of_real_scoring(protocol: str, beams: int) -> None:
    model = TextModel(attach(make_tiny_model("llama"), MocMethod(rank=4)), make_byte_tokenizer())
    work: Any = generate if protocol == "generate" else rank
    examples = questions(ROWS, TOKENS - (protocol == "rank"))  # an option is a token too
    counted = peak("cpu", lambda: work(model, examples, batch_size=ROWS))
    adapted = attach(shapes(), MocMethod(rank=4))
    with FakeDevice("cpu"):
        planned = peak("meta", lambda: score(adapted, Scoring(Choice(), ROWS, TOKENS, beams)))
    assert planned == pytest.approx(counted, rel=0.03)


def test_a_recipe_says_what_is_scored() -> None:
    """The longest prompt counts, where the rows are at hand, up to the model's positions."""
    own = load_recipe("quickstart", ["eval.per_device_eval_batch_size=8"])
    model = build.base_shape(own)
    assert scoring_of(own, model, Choice(), 9) == Scoring(Choice(), 8, 9)
    assert scoring_of(own, model, Choice(), 10**9).tokens == max_positions(model)
    written = load_recipe(
        "quickstart", ["eval.protocol=generate", "eval.per_device_eval_batch_size=auto"]
    )
    assert scoring_of(written, model, Choice(), 9) == Scoring(Choice(), 1, 9, beams=4)
    kind = SimpleNamespace(
        prompt=lambda example: example.eval_prompt,
        voters=lambda texts, tokenizer, limit: [{"input_ids": e.eval_prompt} for e in texts],
    )
    splits = Splits([], [], {"t": questions(3, 40), "none": []})
    rows: Any = SimpleNamespace(encoded=None, kind=kind, splits=splits)
    assert Rows.of(rows, make_byte_tokenizer(), 64).longest == len(questions(3, 40)[0].eval_prompt)


def test_a_larger_evaluation_is_planned_as_larger() -> None:
    sizes = []
    for change in ("per_device_eval_batch_size=1", "per_device_eval_batch_size=64"):
        own = load_recipe("quickstart", ["method=control", f"eval.{change}"])
        plan = Planner(None, Rows(None)).plan(own, all_layers=True)
        sizes.append(plan.parts["evaluation"])
    assert 20 * sizes[0] < sizes[1] < 80 * sizes[0]
