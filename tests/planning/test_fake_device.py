"""What a training step asks of a device: host syncs, kernels, bytes; on one that is not there."""

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from support.models import make_tiny_model, tiny_config
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from moc_cli.kinds.loss import LanguageLoss
from moc_cli.methods import attach
from moc_cli.planning.fake_device import META, FakeDevice
from moc_cli.planning.live_memory import LiveMemory, PhasePart, highest
from moc_cli.planning.replay import STEPS, Phases, StepMeasurement, counted, make_loop, replay
from moc_cli.recipe.methods import ControlMethod, DoraMethod, LoraMethod, MocMethod
from moc_cli.training.loop_types import Settings
from moc_cli.training.recompute import recompute_layers

METHODS: dict[str, Any] = {
    "control": ControlMethod(rank=4),
    "moc": MocMethod(rank=4),
    "moc-rows": MocMethod(rank=4, routing={"level": "sample"}),
    "lora": LoraMethod(rank=4),
}
KERNELS_TO_CONTROL = {"forward": 1.75, "backward": 2.0}  # of a layer, at most


def shapes_of(family: str = "llama", **changes: Any) -> PreTrainedModel:
    with META:
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes))


def batch(rows: int = 8, tokens: int = 48) -> dict[str, torch.Tensor]:
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, tokens // 2 :] = 0  # there is padding, as in nearly every batch
    ids = torch.full((rows, tokens), 7)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@cache
def step(method: str, layers: int) -> StepMeasurement:
    """A later step: the first one also puts on the device what stays there."""
    adapted = attach(shapes_of(num_hidden_layers=layers), METHODS[method])
    replay(adapted, batch(), LanguageLoss, Settings())
    return replay(adapted, batch(), LanguageLoss, Settings())


def syncs_in(measured: StepMeasurement, part: str) -> int:
    return sum(count for sync, count in measured.fake.syncs.items() if part in sync.line)


@pytest.mark.parametrize("method", METHODS)
def test_host_syncs_of_a_step(method: str) -> None:
    """One: the loop's own. Neither the vote nor the padding's mask waits for anything."""
    syncs = step(method, 2).fake.syncs
    assert syncs.total() == syncs_in(step(method, 2), "training/gradients.py") == 1, syncs


def test_kernels_of_a_layer_against_control() -> None:
    def of_a_layer(name: str) -> Counter[str]:
        return step(name, 4).fake.kernels - step(name, 2).fake.kernels

    ours, control = of_a_layer("moc"), of_a_layer("control")
    for way, limit in KERNELS_TO_CONTROL.items():
        assert ours[way] <= limit * control[way], (dict(ours), dict(control))


@pytest.mark.parametrize(
    ("method", "mode"),
    [*((method, "none") for method in METHODS), ("moc", "full"), ("moc", "selective")],
)
def test_planned_bytes_are_those_of_a_real_step(method: str, mode: str) -> None:
    """The same loop on the CPU, its tensors counted: within 3 % of the fake one, in each part."""
    shapes, model, cpu = shapes_of(), make_tiny_model("llama"), torch.device("cpu")
    for network in (shapes, model):
        recompute_layers(network, mode)
    adapted = attach(shapes, METHODS[method])
    planned = replay(adapted, batch(), LanguageLoss, Settings(), device_type="cpu")
    loop = make_loop(attach(model, METHODS[method]), batch(), LanguageLoss, Settings(), cpu)
    with counted(loop, Phases(loop), cpu) as memory:
        for _ in range(STEPS):
            memory.restart()
            loop.train_step()
    planned, real = highest(planned.phases.values()), highest(memory.peaks.values())
    assert sum(planned.values()) == pytest.approx(memory.peak, rel=0.03)
    for part in ("weights", "controls"):
        assert planned[part] == real[part]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_keeps_no_scores(masked: bool) -> None:
    """Twice as long rows take twice the memory, beside the mask, as flash attention does."""
    peaks = []
    for tokens in (512, 1024):
        with FakeDevice(), LiveMemory("meta", lambda: PhasePart("all", "all")) as memory:
            mask = (
                torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=META) if masked else None
            )
            start = memory.total + masked * 2 * tokens**2  # the mask in the rows' type
            q = torch.empty(1, 8, tokens, 16, dtype=torch.bfloat16, device=META)
            q.requires_grad_()
            F.scaled_dot_product_attention(q, q, q, mask, is_causal=not masked).sum().backward()
            peaks.append(memory.peak - start)
    assert peaks[1] == pytest.approx(2 * peaks[0], rel=0.01)


@pytest.mark.parametrize(("like", "bytes_kept"), [("cuda", 1), ("cpu", 4)])
def test_dropout_keeps_a_byte_a_number_on_a_gpu(like: str, bytes_kept: int) -> None:
    """An H100 showed it: LoRA in all layers of LLaMA2-7B took 3.6 GB less than two bytes would."""
    kept: list[int] = []
    x = torch.empty(100, device=META, requires_grad=True)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with FakeDevice(like), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nn.Dropout(0.05)(x)
    assert sum(kept) == 100 * bytes_kept


def test_values_are_answered_and_counted() -> None:
    tensor = torch.zeros(3, 2, device=META)
    with FakeDevice() as fake:
        assert tensor.sum().item() == 1.0
        assert tensor.tolist() == [[0, 0]] * 3
        assert not (tensor > 0).any()
        assert tensor[tensor > 0].shape == (6,)
        torch.tensor([1], device=META)
        torch.zeros(2).to(META, non_blocking=True)
    assert sorted(sync.operation for sync in fake.syncs.elements()) == [
        "_local_scalar_dense",
        "_local_scalar_dense",
        "copy",
        "index",
        "tensor",
    ]
    assert all("test_fake_device.py" in sync.line for sync in fake.syncs)


def test_tensors_of_the_host_are_refused() -> None:
    layer = nn.Linear(4, 4, device=META)
    with FakeDevice(), pytest.raises(RuntimeError, match="a tensor of the host"):
        layer(torch.zeros(2, 4))


def test_memory_counts_each_storage_once_until_it_is_free() -> None:
    with LiveMemory("cpu", lambda: PhasePart("all", "x")) as memory:
        first = torch.zeros(256)  # 1 KiB
        view = first[:4]
        second = torch.zeros(100)  # a block of 512
        assert memory.live == {"x": 1536}
        memory.assign([view], "y")
        del first, second
        assert +memory.live == {"y": 1024}
        del view
        assert memory.total == 0
    assert memory.peak == 1536


def test_a_generation_reads_its_routes_once() -> None:
    """One wait for the ids and one for the weights of all sites, whatever their number."""
    waits = []
    for layers in (2, 4):
        model = shapes_of(num_hidden_layers=layers).eval()
        attach(model, MocMethod(rank=4))
        ids = torch.full((2, 6), 7, device=META)
        with torch.no_grad(), FakeDevice() as fake:
            cache = model(ids, use_cache=True).past_key_values
            model(ids[:, :1], past_key_values=cache)
        waits.append(sum(n for sync, n in fake.syncs.items() if "nn/forward" in sync.line))
    assert waits == [2, 2]


def test_dora_over_a_bfloat16_base_is_planned_as_it_runs() -> None:
    """Its products are made under autocast, which the device of plans does not have."""
    planned, counted_bytes = planned_and_counted("llama", DoraMethod(rank=4), torch.bfloat16)
    assert planned == pytest.approx(counted_bytes, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_planned_as_they_run(dtype: torch.dtype) -> None:
    """In all experts together each row counts once for each of its experts, as in the products."""
    sizes = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    planned, counted_bytes = planned_and_counted(
        "qwen3_moe", MocMethod(rank=4), dtype, **sizes, experts_implementation="grouped_mm"
    )
    assert planned == pytest.approx(counted_bytes, rel=0.05)


def planned_and_counted(
    family: str, method: Any, dtype: torch.dtype, **changes: Any
) -> tuple[int, int]:
    """The bytes of a step at most: by its plan, and counted while it runs on the CPU."""
    settings, cpu = Settings(), torch.device("cpu")
    with META:
        shapes = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype)
    planned = replay(attach(shapes, method), batch(), LanguageLoss, settings, device_type="cpu")
    model = make_tiny_model(family, dtype=dtype, **changes)
    loop = make_loop(attach(model, method), batch(), LanguageLoss, settings, cpu)
    with counted(loop, Phases(loop), cpu) as memory:
        for _ in range(STEPS):
            memory.restart()
            loop.train_step()
    return sum(highest(planned.phases.values()).values()), memory.peak


def test_products_of_groups_have_the_shapes_and_operations_of_the_real_ones() -> None:
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    shapes = [((8, 16), (2, 16, 24)), ((2, 8, 16), (2, 16, 24)), ((16, 8), (8, 24))]
    for first, second in shapes:
        sizes = (torch.ones(first), torch.ones(second))
        given = offsets if min(map(len, (first, second))) == 2 else None
        result = torch.nn.functional.grouped_mm(*sizes, offs=given)
        with FakeDevice("cpu") as fake:
            fakes = [tensor.to(META) for tensor in sizes]
            shown = torch._grouped_mm(*fakes, None if given is None else given.to(META))
        assert (shown.shape, shown.dtype) == (result.shape, result.dtype)
        inner = first[-1]
        products = result.numel() * inner // (2 if len(first) == len(second) == 2 else 1)
        assert {kernel.flops for kernel in fake.work if kernel.flops} == {2 * products}
