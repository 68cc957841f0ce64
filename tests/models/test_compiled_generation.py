"""Compiled generation: one graph for all prompts and routes of a size, the texts of eager runs."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from support.models import make_tiny, train_controls
from support.tracing import traced
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

from moc_cli.errors import MocError
from moc_cli.methods import Adapted, attach
from moc_cli.models import compiled_generation as module
from moc_cli.models import compiler
from moc_cli.models.compiled_generation import compiled_generation
from moc_cli.recipe.methods import ControlMethod, MethodConfig, MocMethod

NEW = 5
GATE = {"projection_dim": 8}
METHODS: dict[str, MethodConfig] = {
    "moc": MocMethod.model_validate({"rank": 4, "top_k": 2, "alpha": 0.6, "gate": GATE}),
    "control": ControlMethod(rank=4),
}
# Rows and tokens of prompts: others of a size, a single row, and several in one graph again.
SIZES = ((3, 7), (3, 9), (3, 12), (1, 5), (1, 8))


@pytest.fixture
def traced_model() -> Iterator[None]:
    with traced():
        yield


@cache
def adapted_of(family: str, method: str) -> Adapted:
    adapted = attach(make_tiny(family, dtype=torch.float64), METHODS[method], seed=1)
    train_controls(adapted.named_trainables())
    adapted.model.generation_config.eos_token_id = None
    adapted.model.train(False)
    return adapted


def prompts(rows: int, tokens: int) -> dict[str, Tensor]:
    """Random prompts, the first of them padded."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(5, 40, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, rows: int, tokens: int, **options: Any) -> Tensor:
    """Logits (B, NEW, vocabulary) of a generation."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "num_beams": 1}
    with torch.no_grad():
        out = model.generate(
            **prompts(rows, tokens),
            return_dict_in_generate=True,
            output_logits=True,
            **settings | options,
        )
    return torch.stack(out.logits, dim=1)


@pytest.mark.parametrize(
    ("family", "method", "beams"),
    [("llama", "moc", 1), ("gemma3", "moc", 2), ("llama", "control", 1)],
)
def test_texts_are_those_of_eager_runs_and_few_graphs_serve_all(
    family: str, method: str, beams: int, traced_model: None
) -> None:
    """Routes differ from prompt to prompt; the graph does not. A second size makes another graph;
    layers with a window of their own begin with one more.
    """
    model, graphs = adapted_of(family, method).model, []
    expected = [generate(model, *size, num_beams=beams) for size in SIZES]
    compiled = []
    for sizes in (SIZES[:3], SIZES[3:]):  # the same model again
        with compiled_generation(model, True):
            for size in sizes:
                compiled.append(generate(model, *size, num_beams=beams))
                graphs.append(counters["stats"]["unique_graphs"])
    first = 1 + (family == "gemma3")
    assert graphs == [first, first, first, first + 1, first + 1]
    assert not counters["graph_break"]
    for ours, eager in zip(compiled, expected, strict=True):
        # A beam search adds log-probabilities in float32.
        atol = 1e-12 if eager.dtype == torch.float64 and beams == 1 else 1e-5
        assert torch.allclose(ours, eager, rtol=0, atol=atol)
    counters.clear()
    generate(model, *SIZES[0])
    assert not counters["stats"], "generation is compiled no more"


def test_prompts_of_one_size_differ_in_the_controls_that_they_use() -> None:
    """Else the law above would say nothing of the shapes."""
    model, used = adapted_of("llama", "moc").model, []
    for size in SIZES[:3]:
        with torch.no_grad():
            model(**prompts(*size))
        sites = model.moc.sites
        used.append([len(set(site.choice.flatten().tolist())) for site in sites])
    assert len(set(map(tuple, used))) > 1


def test_a_cache_is_rounded_up_so_that_lengths_share_graphs(
    monkeypatch: pytest.MonkeyPatch, traced_model: None
) -> None:
    monkeypatch.setattr(module, "PLACES", 8)
    model = adapted_of("llama", "control").model
    graphs = []
    with compiled_generation(model, True):
        for tokens in (4, 9, 10, 11):  # with five more: 16 places, and all others in them too
            generate(model, 2, tokens)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1, 1]


@pytest.mark.parametrize(("device", "missing"), [("cpu", "a C++ compiler"), ("cuda", "triton")])
def test_what_a_compiler_needs_is_said(
    device: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    monkeypatch.setattr(compiler, "has_triton", lambda: False)
    assert missing in str(compiler.compiler_problem(torch.device(device)))


def test_a_model_that_cannot_be_compiled_is_one_sentence() -> None:
    model = adapted_of("llama", "control").model
    own = model.generate
    with (
        pytest.raises(MocError, match="^eval.torch_compile: the model could not be compiled: no"),
        compiled_generation(model, True),
    ):
        raise TorchDynamoException("\nno\nmore")
    assert model.generate == own
