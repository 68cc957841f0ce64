"""Generation with each variant and with the bare base model, in turns."""

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moc_cli.benchmark.machine import Clock
from moc_cli.benchmark.memory import StepMemory
from moc_cli.benchmark.models import Bases, sharing_copy
from moc_cli.benchmark.turns import (
    BenchmarkOptions,
    Lengths,
    Turn,
    VariantMeasurement,
    naming,
    take_turns,
    timed,
)
from moc_cli.benchmark.variants import Variant
from moc_cli.errors import MocError
from moc_cli.models.compiled_generation import compiled_generation
from moc_cli.models.load import Loaded
from moc_cli.models.tokens import embeddings
from moc_cli.report.progress import WorkProgress
from moc_cli.scoring.forward import evaluating
from moc_cli.training import build
from moc_cli.training.memory import tensor_bytes

MERGED = ("lora", "dora")  # their weights are added to the base's before they are measured


def measure_generation(
    variants: Sequence[Variant],
    bases: Bases,
    device: torch.device,
    options: BenchmarkOptions,
    clock: Clock,
    bar: WorkProgress,
) -> list[VariantMeasurement]:
    """Let every variant write greedily; the bare bases are among them.

    A batch has `eval.per_device_eval_batch_size` prompts, one for `auto`. Raises MocError where a
    recipe's model writes no text, and naming a variant that does not fit in memory.
    """
    lengths = options.lengths
    assert lengths is not None
    if variants[0].recipe.data.kind.classifier:
        raise MocError("a classifier writes no text", "leave out --generate")
    models = [_model_of(variant, bases, device) for variant in variants]
    prompts = [_prompts(v, model, lengths) for v, model in zip(variants, models, strict=True)]

    def write(number: int) -> Turn:
        model, compiled = models[number], variants[number].recipe.eval.torch_compile
        with evaluating(model), compiled_generation(model, compiled):
            return _write(model, prompts[number].to(device), lengths.new, clock)

    turns = take_turns(variants, write, options, device, bar)
    return [
        VariantMeasurement(
            variant, variant_turns, _memory(model, max(turn.working for turn in variant_turns))
        )
        for variant, variant_turns, model in zip(variants, turns, models, strict=True)
    ]


def _model_of(variant: Variant, bases: Bases, device: torch.device) -> PreTrainedModel:
    """Return a variant's model as its users generate with it: low-rank updates are merged."""
    base = bases.of(variant.recipe)
    if variant.bare:
        return base.model
    with naming(variant):
        if variant.method not in MERGED:
            return build.place_method(variant.recipe, sharing_copy(base), device).adapted.model
        base_copy = Loaded(copy.deepcopy(base.model), base.new_modules, "", base.source)
        return build.place_method(variant.recipe, base_copy, device).adapted.merge()


def _prompts(variant: Variant, model: PreTrainedModel, lengths: Lengths) -> Tensor:
    """Return random prompts (B, T), the same ones for equal batch sizes."""
    size = variant.recipe.eval.per_device_eval_batch_size
    rng = random.Random(variant.recipe.seed)
    tokens = range(embeddings(model))
    rows = range(1 if size == "auto" else size)
    return torch.tensor([rng.choices(tokens, k=lengths.prompt) for _ in rows])


def _write(model: Any, ids: Tensor, new: int, clock: Clock) -> Turn:
    """Write `new` greedy tokens after each prompt; a CPU does not tell the bytes."""
    bytes_before = 0
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(ids.device)
        bytes_before = torch.cuda.memory_allocated(ids.device)

    def generate() -> None:
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            num_beams=1,
            do_sample=False,
            pad_token_id=0,
        )

    seconds = timed(generate, ids.device, clock)
    working = torch.cuda.max_memory_allocated(ids.device) - bytes_before if ids.is_cuda else 0
    return Turn(seconds, len(ids), len(ids) * new, working)


def _memory(model: PreTrainedModel, working: int) -> StepMemory:
    weight_bytes = tensor_bytes([*model.parameters(), *model.buffers()])
    return StepMemory(weight_bytes + working if working else None, weight_bytes)
