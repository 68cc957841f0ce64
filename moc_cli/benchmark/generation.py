"""Generation with each variant and with the bare base model, one after another and again."""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moc_cli.benchmark.machine import Clock
from moc_cli.benchmark.memory import Memory
from moc_cli.benchmark.models import Bases, sharing_copy
from moc_cli.benchmark.steps import Progress, naming, wait
from moc_cli.benchmark.variants import Variant, with_bases
from moc_cli.errors import MocError
from moc_cli.kinds import make_kind
from moc_cli.models.compiled_generation import compiled_generation
from moc_cli.models.load import Loaded
from moc_cli.models.tokens import embeddings
from moc_cli.scoring.forward import evaluating
from moc_cli.training import build
from moc_cli.training.compiled import matmul_precision
from moc_cli.training.memory import tensor_bytes

MERGED = ("lora", "dora")  # their weights are added to the base's before they are measured


@dataclass(frozen=True)
class Lengths:
    """Tokens of each prompt, and new ones after it."""

    prompt: int
    new: int


@dataclass(frozen=True)
class Written:
    """The seconds in which a variant wrote each of its batches of `rows` rows, and its memory."""

    variant: Variant
    rows: int
    seconds: list[float]
    memory: Memory


def measure_generation(
    variants: Sequence[Variant],
    bases: Bases,
    device: torch.device,
    lengths: Lengths,
    *,
    repeats: int,
    warmup: int,
    clock: Clock,
    on_progress: Progress,
) -> list[Written]:
    """Let every variant and the bare base write greedily for `warmup`, then for `repeats` turns.

    A batch has `eval.per_device_eval_batch_size` prompts, one for `auto`. Raises MocError where a
    recipe's model writes no text, and naming a variant that does not fit in memory.
    """
    if make_kind(variants[0].recipe.data).loss != "causal":
        raise MocError("a classifier writes no text", "leave out --generate")
    arms = with_bases(variants)
    models = [_model_of(variant, bases, device) for variant in arms]
    prompts = [_prompts(v, model, lengths) for v, model in zip(arms, models, strict=True)]
    seconds: list[list[float]] = [[] for _ in arms]
    peaks: list[int] = [0] * len(arms)
    for turn in range(warmup + repeats):
        for number, variant in enumerate(arms):
            torch.set_float32_matmul_precision(matmul_precision(variant.recipe, device))
            compiled = compiled_generation(models[number], variant.recipe.eval.torch_compile)
            with naming(variant), evaluating(models[number]), compiled:
                ids = prompts[number].to(device)
                taken, working = _write(models[number], ids, lengths.new, clock)
            if turn >= warmup:
                seconds[number].append(taken)
                peaks[number] = max(peaks[number], working)
            on_progress(turn * len(arms) + number + 1, variant.name)
    return [
        Written(variant, len(ids), taken, _memory(model, peak))
        for variant, ids, taken, model, peak in zip(
            arms, prompts, seconds, models, peaks, strict=True
        )
    ]


def _model_of(variant: Variant, bases: Bases, device: torch.device) -> PreTrainedModel:
    """Return a variant's model as its users generate with it: low-rank updates are merged."""
    base = bases.of(variant.recipe)
    if variant.bare:
        return base.model
    with naming(variant):
        if variant.method not in MERGED:
            return build.place_method(variant.recipe, sharing_copy(base), device).adapted.model
        own = Loaded(copy.deepcopy(base.model), base.new_modules, "", base.source)
        return build.place_method(variant.recipe, own, device).adapted.merge()


def _prompts(variant: Variant, model: PreTrainedModel, lengths: Lengths) -> Tensor:
    """Return random prompts (B, T), the same ones for equal batch sizes."""
    size = variant.recipe.eval.per_device_eval_batch_size
    rng = random.Random(variant.recipe.seed)
    tokens = range(embeddings(model))
    rows = range(1 if size == "auto" else size)
    return torch.tensor([rng.choices(tokens, k=lengths.prompt) for _ in rows])


def _write(model: Any, ids: Tensor, new: int, clock: Clock) -> tuple[float, int]:
    """Return the seconds of `new` greedy tokens after each prompt, and the bytes beyond the model's
    (0 on a CPU, which does not tell).
    """
    before = 0
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(ids.device)
        before = torch.cuda.memory_allocated(ids.device)
    wait(ids.device)
    begin = clock()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new,
        min_new_tokens=new,
        num_beams=1,
        do_sample=False,
        pad_token_id=0,
    )
    wait(ids.device)
    seconds = clock() - begin
    return seconds, torch.cuda.max_memory_allocated(ids.device) - before if ids.is_cuda else 0


def _memory(model: PreTrainedModel, working: int) -> Memory:
    kept = tensor_bytes([*model.parameters(), *model.buffers()])
    return Memory(kept + working if working else None, kept)
