"""The one door to bitsandbytes, which is imported only where something asks for it."""

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from moc_cli.errors import MocError

# It warns at each start of a CPU kernel that it would have to fetch from the hub.
_NOTICE = "bitsandbytes.backends.cpu.ops"


def silence_notice() -> None:
    """Silence the warning about a 4-bit CPU kernel, which is given when bitsandbytes is imported.

    peft and transformers import it by themselves.
    """
    logging.getLogger(_NOTICE).setLevel(logging.ERROR)


def has_bitsandbytes() -> bool:
    """Whether the package is installed."""
    return find_spec("bitsandbytes") is not None


def import_bitsandbytes() -> Any:
    """Return the package; raises MocError where it is not installed."""
    if not has_bitsandbytes():
        raise MocError("bitsandbytes is not installed", "pip install bitsandbytes")
    silence_notice()
    return import_module("bitsandbytes")
