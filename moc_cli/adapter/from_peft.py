"""A folder that `peft` saved with `MocConfig`, read as an adapter folder of our own."""

import hashlib
from pathlib import Path

from safetensors.torch import load
from torch import Tensor

from moc_cli.adapter.check import check_bounds, check_finite, open_adapter, read_state
from moc_cli.adapter.config import AdapterConfig, parse_adapter
from moc_cli.adapter.folder import CONFIG, FORMAT, PAYLOAD, read_shapes, read_values
from moc_cli.errors import RunError
from moc_cli.run_files import read_bytes

_MODEL = "base_model.model."
_SETS = f"{_MODEL}moc.moc_mixtures."
_SAME = (
    *("method", "seed", "revision", "base_weights_sha256", "base_fingerprint"),
    *("id2label", "pad_token_id"),
)


def read_any(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return config and tensors of an adapter folder, or of one that peft saved with MocConfig.

    Raises RunError where the folder is damaged, or holds another method of peft.
    """
    values = read_values(folder)
    kind = values.get("peft_type")
    if "format" in values or kind is None:
        adapter, config, _ = open_adapter(folder)
        return config, read_state(adapter)
    if kind != "MOC":
        raise RunError(
            f"{folder} holds an adapter of peft's own, {str(kind)[:20]}",
            "only moc and control are taken in from peft; train the others with moc train",
        )
    shapes = read_shapes(folder)
    payload = read_bytes(folder / PAYLOAD, largest=None)
    raw = {key: values[key] for key in _SAME if values.get(key) is not None}
    raw |= {
        "format": FORMAT,
        "modules": values.get("modules_to_save") or [],
        "base_model_name_or_path": values.get("base_model_name_or_path") or "unknown",
        "base_weights_sha256": values.get("base_weights_sha256"),
        "payload_sha256": hashlib.sha256(payload).hexdigest(),
    }
    config, _ = parse_adapter(raw, f"{folder}: {CONFIG}")
    check_bounds(folder, config.method, shapes)
    state = {_own_key(key): value for key, value in load(payload).items()}
    check_finite(state, folder)
    return config, state


def _own_key(key: str) -> str:
    """A parameter's name in our file, from that in peft's."""
    if key.startswith(_SETS):
        return key.removeprefix(_SETS)
    return f"modules.{key.removeprefix(_MODEL)}"
