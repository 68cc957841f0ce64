"""A base whose layers are split over processes: the gradients and texts of a whole one."""

from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from support.group import run_together
from support.messages import refused
from support.models import ENCODERS, make_batch, make_tiny
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from moc_cli.errors import MocError
from moc_cli.kinds.loss import ClassLoss, LanguageLoss
from moc_cli.methods import Adapted, attach
from moc_cli.models.load import load_model
from moc_cli.models.quantization import has_bitsandbytes
from moc_cli.processes import Processes
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.methods import ControlMethod, LoraMethod, MocMethod
from moc_cli.recipe.quantization import Quantization
from moc_cli.training.gradients import Gradients
from moc_cli.training.loop_types import Data, Settings
from moc_cli.training.memory import tensor_bytes
from moc_cli.training.recompute import recompute_layers
from moc_cli.training.sharding import check_sharding, shard_layers

CPU = torch.device("cpu")
FOUR_BITS = "4 bits"
MOC = MocMethod(rank=4, top_k=2, gate={"projection_dim": 8})
CASES: list[tuple[str, Any, str]] = [
    ("llama", MOC, "none"),
    ("llama", ControlMethod(rank=4), "full"),
    ("llama", LoraMethod(rank=4, alpha=8, dropout=0.0, init="pissa"), "none"),
    ("gemma3", MOC, "none"),  # layers deeper in the model
    ("roberta", MOC, "none"),
    *([(FOUR_BITS, MOC, "none")] if has_bitsandbytes() else []),
]
MICRO_BATCHES = 3  # of two processes one has a single one


def make_window(family: str) -> list[dict[str, Tensor]]:
    window = []
    for number in range(MICRO_BATCHES):
        batch = make_batch(3 + number)
        rows = len(batch["input_ids"])
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if family in ENCODERS:
            labels = torch.arange(rows) % 3
        window.append(batch | {"labels": labels})
    return window


def make_model(family: str) -> PreTrainedModel:
    if family != FOUR_BITS:
        return make_tiny(family)
    name, bits = "builtin:world-llama", Quantization(load_in_4bit=True)
    return load_model(name, kind="causal", quantization=bits, split=True).model


class Trained:
    """A model after the gradients of one window: what all its processes have of it."""

    def __init__(self, case: tuple[str, Any, str], group: Processes, split: bool) -> None:
        family, method, mode = case
        self.adapted: Adapted = attach(make_model(family), method, seed=1)
        self.model = self.adapted.model
        recompute_layers(self.model, mode)
        if split:
            shard_layers(self.model, CPU, group)
        loss = ClassLoss if family in ENCODERS else LanguageLoss
        data = Data(cast(Any, None), cast(Any, None), loss)
        settings = Settings(gradient_accumulation_steps=2, processes=2, max_grad_norm=0)
        accelerator = Accelerator(cpu=True)
        gradients = Gradients(self.adapted, data, settings, accelerator, group)
        self.model.train()
        recorder = self.adapted.recorder(detailed=False)
        sums = gradients.of_window(
            make_window(family),
            (0, 0),
            signal=None,
            after_forward=(lambda: None) if recorder is None else recorder.count,
            meanwhile=lambda: None,
        )
        self.choices = None if recorder is None else recorder.record().choices()
        self.losses = sums.losses
        named = self.adapted.named_trainables()
        self.gradients = {name: parameter.grad for name, parameter in named.items()}
        self.texts = None
        if family not in ENCODERS:
            self.model.eval()
            batch = make_batch(3, side="left")
            self.texts = self.model.generate(**batch, max_new_tokens=3, do_sample=False)


def check_split(group: Processes) -> None:
    for case in CASES:
        whole, split = Trained(case, Processes(), split=False), Trained(case, group, split=True)
        assert split.losses == pytest.approx(whole.losses, rel=1e-5), case
        for name, gradient in whole.gradients.items():
            assert torch.allclose(split.gradients[name], gradient, atol=1e-5, rtol=1e-4), case
        assert any(gradient.any() for gradient in whole.gradients.values())
        assert whole.texts is None or torch.equal(whole.texts, split.texts), case
        check_held(whole.model, split)
        if whole.choices is not None:  # of the whole one both processes have counted all
            assert whole.choices == [[2 * n for n in site] for site in split.choices], case


def check_held(whole: PreTrainedModel, split: Trained) -> None:
    """Half of each layer is here, all else whole."""
    own = {id(parameter) for parameter in split.adapted.named_trainables().values()}
    for name, parameter in split.model.named_parameters():
        frozen_in_layer = ".layers." in f".{name}" or ".layer." in name
        if id(parameter) in own or not frozen_in_layer:
            assert not isinstance(parameter, DTensor), name
        else:
            assert isinstance(parameter, DTensor), name
            assert tensor_bytes([parameter]) <= parameter.nbytes // 2 + parameter[0].nbytes
    assert tensor_bytes(split.model.parameters()) < tensor_bytes(whole.parameters())


def test_a_split_base_gives_the_gradients_of_a_whole_one() -> None:
    run_together(check_split, 2)


def test_what_cannot_be_split_is_refused() -> None:
    model = make_tiny("llama")
    check_sharding(model)
    with refused(MocError):
        check_sharding(cast(Any, torch.nn.Linear(2, 2)))
    model.quantization = Quantization(load_in_8bit=True)
    with refused(MocError):
        check_sharding(model)
    model.quantization = Quantization(load_in_4bit=True)
    check_sharding(model)
    model.config.quantization_config = {"load_in_4bit": True}
    with refused(MocError):
        check_sharding(model)
    changes = ["method=molex", "train.torch_compile=true", "model.load_in_8bit=true"]
    with refused(MocError):
        load_recipe("quickstart", [*changes, "launch.strategy=fsdp2"])
