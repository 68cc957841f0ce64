"""`MocConfig`: what `adapter_config.json` says of a set of controls for `peft`."""

import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from moc_cli.adapter.check import check_bounds
from moc_cli.adapter.config import make_method
from moc_cli.adapter.folder import PAYLOAD, read_shapes
from moc_cli.errors import MocError
from moc_cli.recipe.methods import ControlMethod, MocMethod

NAME = "MOC"


@dataclass(init=False)
class MocConfig(PeftConfig):
    """`MocConfig(rank=16, top_k=2)`: the keys of a recipe's `method` section, and peft's own.

    `method` is the section's name, moc (default) or control, or the whole section.
    `base_fingerprint` tells the base by samples of its parameters, `state_sha256` the payload; both
    are compared if they are there. `id2label` names the classes of a classifier; `pad_token_id` is
    set in the config of one that is a decoder, which pools by it. `modules_to_save` names modules
    that are trained and saved whole. Raises RecipeError with all mistakes in keys.
    """

    method: dict[str, Any] = field(default_factory=dict)
    seed: int = 42
    modules_to_save: list[str] | None = None
    base_weights_sha256: str | None = None
    id2label: dict[str, str] | None = None
    pad_token_id: int | None = None
    base_fingerprint: dict[str, str] | None = None
    state_sha256: str | None = None

    def __init__(self, method: str | dict[str, Any] = "moc", **keys: Any) -> None:
        section = {"name": method} if isinstance(method, str) else dict(method)
        for key in fields(self):
            if key.name != "method":
                setattr(self, key.name, keys.pop(key.name, key.default))
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        name = section.pop("name", "moc")
        checked = make_method(name, section | keys)
        if not isinstance(checked, MocMethod | ControlMethod):
            raise MocError(f"MocConfig: method '{name}' has a config of its own in peft")
        self.method = checked.model_dump(mode="json")

    @classmethod
    def from_pretrained(cls, path: str, subfolder: str | None = None, **kwargs: Any) -> "MocConfig":
        """As `peft` does; raises RunError where the config declares more than its payload holds.

        Warns where the base cannot be compared with the one that the set was trained on.
        """
        config: MocConfig = super().from_pretrained(path, subfolder, **kwargs)
        folder = Path(path, subfolder or "")
        if (folder / PAYLOAD).is_file():
            check_bounds(folder, config.section, read_shapes(folder))
        if not config.base_fingerprint:
            warnings.warn(
                f"{folder} does not say which base it was trained on, so that another base would "
                "not be noticed; save the set again with this version",
                stacklevel=2,
            )
        return config

    @property
    def section(self) -> MocMethod | ControlMethod:
        """The checked method."""
        options = dict(self.method)
        checked = make_method(options.pop("name"), options)
        assert isinstance(checked, MocMethod | ControlMethod)
        return checked

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As `peft` does, but without the hash of a payload that may be another one by now."""
        state_hash, self.state_sha256 = self.state_sha256, None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.state_sha256 = state_hash
