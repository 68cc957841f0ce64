"""Questions and pairs of many lengths, and a model with a method that answers them."""

import torch
from transformers import PreTrainedModel

from moc_cli.data.examples import ChoiceExample, PairExample
from moc_cli.methods import Adapted, attach
from moc_cli.recipe.methods import MocMethod


def question(
    number: int, candidates: tuple[str, ...] = ("the kite", "the cat", "the cup")
) -> ChoiceExample:
    """A question whose prompt's length depends on its number."""
    prompt = f"Item {number}: {'word ' * (number * 7 % 11)}{'x' * number}?\n" + " " * 16
    label = number % len(candidates)
    return ChoiceExample(
        "boolq", prompt + candidates[label], len(prompt), prompt, candidates, label
    )


MIXED = [
    question(0),
    question(1, ("the answer1", "the answer2", "the answer3", "the answer4")),
    question(2, ("the answer1", "the answer10")),
    question(3, ("x", "y")),
    question(4, ("true", "a long answer", "b")),
    *(question(number) for number in range(5, 13)),
]

PAIRS = [
    PairExample("mrpc", "a" * (number * 5 % 17 + 1), "bc" * (number % 4 + 1), number % 2)
    for number in range(23)
]


def adapted(model: PreTrainedModel, **options: object) -> Adapted:
    """The model with a mixture whose controls all do something."""
    method = MocMethod(rank=4, alpha=0.5, gate={"projection_dim": 8}, **options)
    found = attach(model, method, seed=3)
    with torch.no_grad():
        for name, parameter in found.named_trainables().items():
            if name.endswith(".B"):
                parameter.normal_(std=0.2)
    return found
