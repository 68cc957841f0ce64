"""Whether a method can be held in memory, and where; asked before anything is allocated."""

import os

import torch
from torch import nn
from transformers import PreTrainedModel

from moc_cli.errors import MocError


def check_size(model: PreTrainedModel, rank: int) -> None:
    """Raise MocError where matrices of this rank alone would take more memory than there is.

    Counted are two matrices of 32-bit numbers for each layer; every method has more.
    """
    config = model.config.get_text_config()
    size = 2 * config.num_hidden_layers * config.hidden_size * rank * 4
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise MocError(
            f"method.rank = {rank} needs more than {size / 1e9:,.0f} GB in this model, and the "
            f"machine has {memory / 1e9:,.0f} GB",
            f"a rank above the hidden size, {config.hidden_size}, adds nothing",
        )


def one_device(layers: nn.Module) -> torch.device:
    """Return the device of all layers; MocError where they lie on several.

    A control adds to layers other than its own, so all controls lie on one device.
    """
    devices = list(dict.fromkeys(str(parameter.device) for parameter in layers.parameters()))
    if len(devices) > 1:
        raise MocError(
            f"the model's layers lie on several devices: {', '.join(devices)}",
            "load it on one: from_pretrained(..., device_map={'': 0}) instead of 'auto'",
        )
    return torch.device(devices[0])
