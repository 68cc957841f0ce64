"""LoRA and DoRA through peft, injected into the model in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import cast_adapter_dtype
from torch import Tensor, nn
from transformers import PreTrainedModel

from moc_cli.errors import MocError
from moc_cli.methods.adapted import Placed
from moc_cli.methods.half import HALF, multiply_in_half, reset_magnitudes
from moc_cli.methods.size import check_size
from moc_cli.methods.targets import find_targets
from moc_cli.models.quantization import of_model
from moc_cli.recipe.methods import REWRITING_INITS, DoraMethod, LoraMethod, MolexMethod

LowRankMethod = LoraMethod | DoraMethod | MolexMethod
_NAME = "default"  # peft's name for a model's only adapter
_PREFIX = "base_model.model."  # what peft's files put before a module's name


class LowRank(Placed):
    """y = W x + (alpha/r)·B A drop(x) in each target; DoRA rescales the rows of W + (alpha/r)·B A.

    Learned: A (r, in), B (out, r) and DoRA's magnitudes, in float32; over a bfloat16 base their
    products are in bfloat16, as under autocast.
    The keys are those of peft's own files, so that `PeftModel.from_pretrained` reads an adapter
    folder. `pissa*` and `olora` rewrite the base: W becomes W − (alpha/r)·B₀A₀. They are computed
    again from the base and the seed, so the same base, seed and kind of device give the same
    model; `disabled` and `detach` put A₀ and B₀ back, which is the base up to rounding.
    """

    def __init__(self, model: PreTrainedModel, method: LowRankMethod, seed: int) -> None:
        init = "default" if isinstance(method, MolexMethod) else method.init
        names = find_targets(model, None if method.targets is None else tuple(method.targets))
        _check(model, names, method.rank, init, use_dora=isinstance(method, DoraMethod))
        check_size(model, method.rank)
        self._method = method
        self._model = model
        self._config = LoraConfig(
            r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            target_modules=names,
            use_dora=isinstance(method, DoraMethod),
            init_lora_weights=True if init == "default" else init,
            task_type="CAUSAL_LM" if model.can_generate() else None,
        )
        meta = next(model.parameters()).device.type == "meta"
        with _seeded(model, seed):
            self._tuner = LoraModel(
                model, {_NAME: self._config}, adapter_name=_NAME, low_cpu_mem_usage=meta
            )
        cast_adapter_dtype(model, _NAME)
        self._layers = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        if model.dtype == HALF:
            for layer in self._layers.values():
                multiply_in_half(layer, _NAME)
        if model.dtype in (torch.bfloat16, torch.float16):
            for layer in self._layers.values():
                reset_magnitudes(layer, _NAME)
        for layer in self._layers.values():  # peft's new modules start in training mode
            layer.train(layer.get_base_layer().training)
        self._first = None
        if init.startswith(REWRITING_INITS) and not meta:
            parameters = self.named_parameters().values()
            self._first = [parameter.detach().clone() for parameter in parameters]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        parameters = {}
        for name, layer in self._layers.items():
            parameters[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A[_NAME].weight
            parameters[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B[_NAME].weight
            if _NAME in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[_NAME].weight
                parameters[f"{_PREFIX}{name}.lora_magnitude_vector"] = magnitude
        return parameters

    def config(self) -> dict[str, Any]:
        """The method, and peft's own fields beside it."""
        fields = {key: _plain(value) for key, value in self._config.to_dict().items()}
        return fields | {"method": self._method.model_dump(mode="json")}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        if self._first is not None:
            with self._as_first():
                yield
            return
        if any(layer.disable_adapters for layer in self._layers.values()):  # within another
            yield
            return
        trained = [(p, p.requires_grad) for p in self.named_parameters().values()]
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()
            for parameter, flag in trained:  # peft switches the flags too
                parameter.requires_grad_(flag)

    def detach(self) -> None:
        if self._first is None:
            self._tuner.unload()
        else:
            self._restore(self._first)
            self._tuner.merge_and_unload()
        vars(self._model).pop("peft_config", None)

    def merge(self) -> None:
        """Fold the method into the weights it adapts, for good."""
        self._tuner.merge_and_unload(safe_merge=True)
        vars(self._model).pop("peft_config", None)

    @contextmanager
    def _as_first(self) -> Iterator[None]:
        """Within it A, B and magnitudes are as `attach` left them, without dropout."""
        parameters = self.named_parameters().values()
        trained = [parameter.detach().clone() for parameter in parameters]
        drops = [layer.lora_dropout for layer in self._layers.values()]
        modes = [drop.training for drop in drops]
        self._restore(self._first or [])
        for drop in drops:
            drop.eval()
        try:
            yield
        finally:
            self._restore(trained)
            for drop, mode in zip(drops, modes, strict=True):
                drop.train(mode)

    @torch.no_grad()
    def _restore(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.named_parameters().values(), values, strict=True):
            parameter.copy_(value)


def _check(
    model: PreTrainedModel, names: list[str], rank: int, init: str, *, use_dora: bool
) -> None:
    """Refuse what the chosen init or the base's type cannot do, before the model is changed."""
    if init == "orthogonal" and rank % 2:
        raise MocError(f"method.init: orthogonal needs an even rank, found method.rank = {rank}")
    quantization = of_model(model)
    if quantization is not None and quantization.load_in_8bit and use_dora:
        raise MocError(
            "dora does not run over 8-bit weights: peft cannot take their norms",
            "take model.load_in_4bit, or lora",
        )
    if not init.startswith(REWRITING_INITS):
        return
    if quantization is not None:
        raise MocError(
            f"method.init: {init} rewrites the base's weights, and this base keeps them in "
            f"{quantization}",
            "take another init, or an unquantised base",
        )
    weights = {name: model.get_submodule(name).weight for name in names}
    for name, weight in weights.items():
        if rank > min(weight.shape):
            raise MocError(
                f"method.init: {init} takes {rank} directions (method.rank) of a weight, but "
                f"'{name}' of shape {tuple(weight.shape)} has only {min(weight.shape)}"
            )


@contextmanager
def _seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Within it peft's draws follow from `seed`; the program's own random state is untouched."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def _plain(value: Any) -> Any:
    """A field of peft's config as JSON takes it."""
    if isinstance(value, set):
        return sorted(value)
    return getattr(value, "value", value)
