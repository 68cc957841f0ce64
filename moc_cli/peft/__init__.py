"""`import moc_cli.peft`: adapters of Mixture-of-Control and Control become known to `peft`.

    import moc_cli.peft
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, "exported")

`peft` keeps its list of methods closed, so that importing this extends it for this process. All
controls of a model lie in one module beside the model's own, so that `peft` saves and switches the
gates with them; only the active set has hooks in the model. Unlike `peft` itself, loading is
strict: about keys, shapes, the base, and a payload that `moc export` wrote.
"""

from importlib.metadata import version

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType
from peft.utils.peft_types import register_peft_method

from moc_cli.errors import MocError
from moc_cli.peft.config import NAME, MocConfig
from moc_cli.peft.tuner import MocModel, state_hash

__all__ = ["NAME", "MocConfig", "MocModel", "register", "state_hash"]

TESTED = "0.21"


def register() -> None:
    """Make the method known to this process's `peft`; does nothing the second time.

    Raises MocError for a version of `peft` that this was not tested with, or that has a method of
    this name itself.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(NAME)
    if registered is MocConfig:
        return
    installed = version("peft")
    if not installed.startswith(f"{TESTED}."):
        raise MocError(
            f"peft {installed} is not a version that moc was tested with: {TESTED}.*",
            f"pip install 'peft=={TESTED}.*', or load the controls with moc_cli.load_controls",
        )
    if registered is not None or NAME in PeftType.__members__:
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
