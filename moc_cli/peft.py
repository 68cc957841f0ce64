"""`import moc_cli.peft`: adapters of Mixture-of-Control and Control become known to `peft`.

    import moc_cli.peft
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, "exported")

`peft` keeps its list of methods closed, so that importing this extends it for this process. All
controls of a model lie in one module beside the model's own, so that `peft` saves and switches the
gates with them; only the active set has hooks in the model. Unlike `peft` itself, loading is
strict: about keys, shapes, the base, and a payload that `moc export` wrote.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import set_additional_trainable_modules
from peft.utils.peft_types import register_peft_method
from torch import Tensor, nn

from moc_cli.adapter.check import check_base, check_bounds, check_finite
from moc_cli.adapter.config import make_method
from moc_cli.adapter.folder import PAYLOAD, read_shapes
from moc_cli.errors import MocError, RunError, compare_entries
from moc_cli.methods.controls import make_mixture
from moc_cli.models.fingerprint import fingerprint
from moc_cli.models.hooks import HookedModel
from moc_cli.models.load import name_classes
from moc_cli.nn.mixture import Mixture
from moc_cli.recipe.methods import ControlMethod, MocMethod

NAME = "MOC"
TESTED = "0.21"
MODULE = "moc"  # the submodule of the base model with every set; not a name with `prefix`
SETS = "moc_mixtures"  # its sets, by the adapter's name


@dataclass
class MocConfig(PeftConfig):
    """What `adapter_config.json` says for `peft`.

    `method` is a recipe's `method` section, of name moc or control. `base_fingerprint` tells the
    base by samples of its parameters, `state_sha256` the payload; both are compared if they are
    there. `id2label` names the classes of a classifier. `modules_to_save` names modules that are
    trained and saved whole.
    """

    method: dict[str, Any] = field(default_factory=lambda: {"name": "moc"})
    seed: int = 42
    modules_to_save: list[str] | None = None
    base_weights_sha256: str | None = None
    id2label: dict[str, str] | None = None
    base_fingerprint: dict[str, str] | None = None
    state_sha256: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        options = dict(self.method)
        name = options.pop("name", "moc")
        section = make_method(name, options)
        if not isinstance(section, MocMethod | ControlMethod):
            raise MocError(f"MocConfig: method '{name}' has a config of its own in peft")
        self.method = section.model_dump(mode="json")

    @classmethod
    def from_pretrained(cls, path: str, subfolder: str | None = None, **kwargs: Any) -> "MocConfig":
        """As `peft` does; raises RunError where the config declares more than its payload holds."""
        config: MocConfig = super().from_pretrained(path, subfolder, **kwargs)
        folder = Path(path, subfolder or "")
        if (folder / PAYLOAD).is_file():
            check_bounds(folder, config.section, read_shapes(folder))
        return config

    @property
    def section(self) -> MocMethod | ControlMethod:
        """The checked method."""
        options = dict(self.method)
        made = make_method(options.pop("name"), options)
        assert isinstance(made, MocMethod | ControlMethod)
        return made

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As `peft` does, but without the hash of a payload that may be another one by now."""
        known, self.state_sha256 = self.state_sha256, None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.state_sha256 = known


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
        self._families: dict[str, Any] = {}
        self._active_adapter = []
        self.merged_adapters = []

    def add(self, name: str, mixture: Mixture, family: Any) -> None:
        """Keep a set, in place of one of the same name; it acts once it is made active."""
        if self._placed == name:
            self._show(None)
        self.moc_mixtures[name] = mixture
        self._families[name] = family

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make one set the active one: the hooks of another leave the model first."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise MocError(
                f"{', '.join(names)}: one set of controls acts at a time in peft",
                "see moc_cli.serving.tenants for batches that mix several",
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
        self._families.pop(adapter_name, None)

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
                model, self.moc_mixtures[name], self._families[name], register=False
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
        """Place a set; the numbers are made on the CPU even with `low_cpu_mem_usage`: they are few.

        Raises RunError for another base than the one that the set was trained on.
        """
        config = self.peft_config[adapter_name]
        check_base(
            getattr(model, "name_or_path", "") or type(model).__name__,
            vars(config),
            fingerprint=fingerprint(model, [MODULE, *(config.modules_to_save or ())]),
            required=False,
        )
        name_classes(model.config, config.id2label)
        mixture, family = make_mixture(model, config.section, config.seed)
        control_sets = getattr(model, MODULE, None)
        if control_sets is None:
            control_sets = ControlSets(model)
            model.add_module(MODULE, control_sets)
        elif not isinstance(control_sets, ControlSets):
            raise MocError(
                "the model holds controls of moc_cli.attach already", "detach them first"
            )
        control_sets.add(adapter_name, mixture, family)
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
        if config.inference_mode:
            mixture.requires_grad_(False)

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise MocError("controls are added beside a model's modules; none is replaced")

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _check_merge_allowed(self) -> NoReturn:
        """Never: peft asks for a ValueError where a method cannot be merged."""
        raise ValueError(
            "controls act on the state beside a whole block and are chosen by the input: there is "
            "no weight to fold them into"
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: there is no weight to merge into."""
        self._check_merge_allowed()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: there is no weight to merge into."""
        self._check_merge_allowed()

    def unload(self) -> nn.Module:
        """Take every set out; the base model is as it came."""
        self.model.get_submodule(MODULE).set_adapter([])
        delattr(self.model, MODULE)
        vars(self.model).pop("peft_config", None)
        model: nn.Module = self.model
        return model

    def set_loss_scale(self, scale: float) -> None:
        """Multiply the balance loss by this: 1 / the number of micro-batches of a step."""
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
        own = {
            key: value
            for key, value in model.state_dict().items()
            if f".{SETS}.{adapter_name}." in f".{key}"
        }
        given = {key: value for key, value in state.items() if f".{SETS}." in f".{key}"}
        wrong = compare_entries(
            {key: tuple(value.shape) for key, value in given.items()},
            {key: tuple(value.shape) for key, value in own.items()},
        )
        check_finite(given, "the adapter's payload")
        if wrong:
            raise RunError(f"the adapter does not fit this model: {wrong}")
        return dict(state)


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


def register() -> None:
    """Make the method known to this process's `peft`; does nothing the second time.

    Raises MocError for a version of `peft` that this was not tested with, or that has a method of
    this name itself.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(NAME)
    if known is MocConfig:
        return
    installed = version("peft")
    if not installed.startswith(f"{TESTED}."):
        raise MocError(
            f"peft {installed} is not a version that moc was tested with: {TESTED}.*",
            f"pip install 'peft=={TESTED}.*', or load the controls with moc_cli.load_controls",
        )
    if known is not None or NAME in PeftType.__members__:
        raise MocError(f"peft {installed} has a method {NAME} of its own", "use load_controls")
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    type.__setattr__(PeftType, NAME, member)
    register_peft_method(name=NAME.lower(), config_cls=MocConfig, model_cls=MocModel)


register()
