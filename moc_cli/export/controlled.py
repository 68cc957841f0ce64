"""The model class of a standalone folder; with all that it uses it becomes one modeling file."""

from typing import Any

from torch import nn

from moc_cli.models.hooks import HookedModel, cast_inputs, find_layers
from moc_cli.models.placement import Place, Placement
from moc_cli.nn.control import Control
from moc_cli.nn.gate import GATES
from moc_cli.nn.mixture import Mixture
from moc_cli.nn.routing import Routing


class Controlled:
    """Placed before a transformers class: the same model with its controls in `self.moc`.

    `config.moc` says where the controls sit and how routes are decided. A setting that this file
    does not know, such as another vote, raises ValueError.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        settings = config.moc
        places = {
            name: Place(**value) if isinstance(value, dict) else value
            for name, value in settings["placement"].items()
        }
        placement = Placement(**places)
        layers = find_layers(self, placement)
        device = next(layers.parameters()).device
        mixture = Mixture(
            len(layers),
            config.get_text_config().hidden_size,
            tuple(settings["blocks"]),
            settings["rank"],
            settings["scale"],
            Routing(**settings["routing"]),
            device="meta" if device.type == "meta" else "cpu",
        )
        HookedModel(self, mixture.to(device), placement)
        self._keep_in_fp32_modules_strict |= {"moc", *settings["modules"]}
        for name in settings["modules"]:
            self.get_submodule(name).register_forward_pre_hook(cast_inputs)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (Control, *GATES.values())):
            module.reset()
        else:
            super()._init_weights(module)
