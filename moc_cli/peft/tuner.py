"""The tuner that `peft` asks for: the sets of controls of a model, placed, switched and read."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from moc_cli.adapter.check import check_base, check_finite
from moc_cli.errors import MocError, RunError, compare_entries
from moc_cli.methods.controls import make_mixture
from moc_cli.models.fingerprint import fingerprint
from moc_cli.models.hooks import HookedModel, cast_inputs
from moc_cli.models.load import name_classes
from moc_cli.models.placement import Placement
from moc_cli.models.quantization import keep_differentiable
from moc_cli.models.stored_weights import find_stored
from moc_cli.models.tokens import set_pad_tokens
from moc_cli.nn.mixture import Mixture

MODULE = "moc"  # the submodule of the base model with every set; not a name with `prefix`
SETS = "moc_mixtures"  # its sets, by the adapter's name


class ControlSets(nn.Module, BaseTunerLayer):  # type: ignore[misc]  # peft has no types
    """Every set of a model, by name; the active one has its hooks in the model."""

    adapter_layer_names = (SETS,)
    prefix = "moc_"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.moc_mixtures = nn.ModuleDict()
        self._model = (model,)  # not as a submodule: it holds this one
        self._hooked: HookedModel | None = None
        self._placed: str | None = None
        self._placements: dict[str, Placement] = {}
        self._active_adapter = []
        self.merged_adapters = []

    def add(self, name: str, mixture: Mixture, placement: Placement) -> None:
        """Keep a set, in place of one of the same name; it acts once it is made active."""
        if self._placed == name:
            self._show(None)
        self.moc_mixtures[name] = mixture
        self._placements[name] = placement

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one set the active one: the hooks of another leave the model first."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise MocError(
                f"{', '.join(names)}: one set of controls acts at a time in peft",
                "use moc_cli.Tenants for batches that mix several",
            )
        super().set_adapter(names, inference_mode=inference_mode)
        self._show(names[0] if names else None)
        for mixture in self.moc_mixtures.values():
            mixture.active = not self.disable_adapters

    def enable_adapters(self, enabled: bool) -> None:
        """Let the active set act, or nothing."""
        super().enable_adapters(enabled)
        for mixture in self.moc_mixtures.values():
            mixture.active = enabled

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop a set; the first of the others becomes active if it was the active one."""
        if self._placed == adapter_name:
            self._show(None)
        super().delete_adapter(adapter_name)
        self._placements.pop(adapter_name, None)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Called by `peft` where it put the loaded numbers on a device of its own choice."""
        (model,) = self._model
        base = next(p for n, p in model.named_parameters() if not n.startswith(f"{MODULE}."))
        self.moc_mixtures[adapter_name].to(device or base.device)

    def _show(self, name: str | None) -> None:
        if name == self._placed:
            return
        if self._hooked is not None:
            self._hooked.remove()
            self._hooked = None
        self._placed = name
        if name is not None:
            (model,) = self._model
            self._hooked = HookedModel(
                model, self.moc_mixtures[name], self._placements[name], register=False
            )


class MocModel(BaseTuner):  # type: ignore[misc]  # peft has no types
    """The tuner that `peft` asks for: controls and gates beside the base model's modules."""

    prefix = "moc_"
    tuner_layer_cls = ControlSets
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Place a set; with `low_cpu_mem_usage` it has no numbers before they are loaded.

        The config of a new set gets the base's fingerprint. Raises RunError for another base than
        the one that the set was trained on.
        """
        config = self.peft_config[adapter_name]
        base = fingerprint(model, [MODULE, *(config.modules_to_save or ())], find_stored(model))
        check_base(
            getattr(model, "name_or_path", "") or type(model).__name__,
            vars(config),
            fingerprint=base,
            required=False,
        )
        config.base_fingerprint = config.base_fingerprint or base
        keep_differentiable(model)
        name_classes(model.config, config.id2label)
        if config.pad_token_id is not None:
            set_pad_tokens(model, config.pad_token_id, config.pad_token_id)
        # peft makes the first set under a context that empties all new modules.
        empty = low_cpu_mem_usage or nn.Linear(1, 1).weight.is_meta
        mixture, placement = make_mixture(model, config.section, config.seed, empty=empty)
        control_sets = getattr(model, MODULE, None)
        if control_sets is None:
            control_sets = ControlSets(model)
            model.add_module(MODULE, control_sets)
        elif not isinstance(control_sets, ControlSets):
            raise MocError(
                "the model holds controls of moc_cli.attach already", "detach them first"
            )
        control_sets.add(adapter_name, mixture, placement)
        self.targeted_module_names = [MODULE]
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        heads = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
        flags = [(parameter, parameter.requires_grad) for parameter in heads.values()]
        self._mark_only_adapters_as_trainable(model)
        for parameter, flag in flags:  # the heads of other sets are as they were
            parameter.requires_grad_(flag)
        set_additional_trainable_modules(
            model=model,
            peft_config=config,
            model_config=self.get_model_config(self),
            adapter_name=adapter_name,
            activate_adapter=adapter_name in self.active_adapters,
        )
        _keep_heads_exact(model, adapter_name)
        if config.inference_mode:
            mixture.requires_grad_(False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Around each forward; raises MocError for a set of its own for each row."""
        if kwargs.get("adapter_names") is not None:
            raise MocError(
                "adapter_names: one set of controls acts on all rows of a batch in peft",
                "use moc_cli.Tenants for batches that mix several",
            )
        yield

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise MocError("controls are added beside a model's modules; none is replaced")

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _check_merge_allowed(self) -> NoReturn:
        """Called before every merge: peft asks for a ValueError where a method cannot be merged."""
        raise ValueError(
            "controls act on the state beside a whole block and are chosen by the input: there is "
            "no weight to fold them into"
        )

    def unload(self) -> nn.Module:
        """Take every set out; the base model is as it came.

        As with peft's own methods, modules of `modules_to_save` are those of the active set.
        """
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper):
                own = module.unload_and_optionally_merge_module(False, False, None)
                self.model.set_submodule(name, own)
        self.model.get_submodule(MODULE).set_adapter([])
        delattr(self.model, MODULE)
        vars(self.model).pop("peft_config", None)
        model: nn.Module = self.model
        return model

    def set_loss_scale(self, scale: float) -> None:
        """Multiply the balance loss by this: 1 / the number of micro-batches of a step.

        Without this call it is scaled as the loss that the model returns for `labels` is.
        """
        for mixture in self.model.get_submodule(MODULE).moc_mixtures.values():
            mixture.loss_scale = scale

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        plain: str = key.replace(f".{SETS}.{adapter_name}.", f".{SETS}.")
        return plain

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Strict where `peft` is not: every key, every shape, and the hash if there is one."""
        if config.state_sha256 and state_hash(state_dict, adapter_name) != config.state_sha256:
            raise RunError("the adapter's payload is damaged: it does not match its hash")
        state = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own_state = {
            key: value
            for key, value in model.state_dict().items()
            if f".{SETS}.{adapter_name}." in f".{key}"
        }
        control_state = {key: value for key, value in state.items() if f".{SETS}." in f".{key}"}
        wrong = compare_entries(
            {key: tuple(value.shape) for key, value in control_state.items()},
            {key: tuple(value.shape) for key, value in own_state.items()},
        )
        check_finite(control_state, "the adapter's payload")
        if wrong:
            raise RunError(f"the adapter does not fit this model: {wrong}")
        return dict(state)


def _keep_heads_exact(model: nn.Module, adapter_name: str) -> None:
    """Keep a set's own modules in float32 in a base of a narrower type, as `attach` does."""
    for module in model.modules():
        if (
            not isinstance(module, ModulesToSaveWrapper)
            or adapter_name not in module.modules_to_save
        ):
            continue
        head = module.modules_to_save[adapter_name]
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in head.parameters()):
            head.float()
            head.register_forward_pre_hook(cast_inputs)


def state_hash(state: Mapping[str, Tensor], adapter_name: str = "default") -> str:
    """sha256 over names, types, shapes and bytes, without the adapter's name in the names."""
    digest = hashlib.sha256()
    plain = {
        key.replace(f".modules_to_save.{adapter_name}.", "."): value.detach().cpu().contiguous()
        for key, value in state.items()
    }
    for key in sorted(plain):
        value = plain[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
