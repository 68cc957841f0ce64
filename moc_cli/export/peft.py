"""`peft`: a folder for `PeftModel.from_pretrained(base, folder)`.

For moc and control the process has to `import moc_cli.peft` first; lora and dora are peft's own.
"""

from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from moc_cli.adapter.config import drawn_from_the_base
from moc_cli.adapter.folder import CONFIG, PAYLOAD
from moc_cli.errors import MocError
from moc_cli.export import FormatOptions, parity
from moc_cli.export.card import base_code
from moc_cli.export.parity import Written
from moc_cli.files import to_plain, write_bytes_atomic, write_json_atomic
from moc_cli.load_run import LoadedRun
from moc_cli.models.quantization import silence_notice
from moc_cli.models.tokens import pooling_token
from moc_cli.recipe.methods import ControlMethod, MocMethod, MolexMethod
from moc_cli.recipe.schema import Recipe

_PREFIX = "base_model.model."


def check(recipe: Recipe) -> None:
    """Raise MocError for what peft cannot hold or would not read back as it is."""
    if isinstance(recipe.method, MolexMethod):
        raise MocError(
            "molex runs a second layer at every depth, which peft has no place for",
            "export with --to controls",
        )
    method = recipe.method
    if drawn_from_the_base(method):
        raise MocError(
            f"method.init {method.init} rewrites the base's weights, "
            "which peft would do again, and not to the bit",
            "export with --to merged or --to controls",
        )


def export(trained: LoadedRun, folder: Path, options: FormatOptions) -> Written:
    """Write config and payload under peft's keys; a fresh process must give our logits."""
    state = {_key(name): value for name, value in trained.adapted.state().items()}
    is_moc = isinstance(trained.recipe.method, MocMethod | ControlMethod)
    config = _moc(trained, state) if is_moc else _low_rank(trained)
    write_bytes_atomic(folder / PAYLOAD, save(state, {"format": "pt"}))
    write_json_atomic(folder / CONFIG, config)
    lines = [base_code(trained), "from peft import PeftModel"]
    if is_moc:
        lines.insert(1, "import moc_cli.peft  # makes the method known to peft")
    loading = "\n".join([*lines, "model = PeftModel.from_pretrained(model, folder)"])
    return Written(
        loading,
        parity.reference(trained),
        tolerance=0 if is_moc else _tolerance(trained),
        notes=("peft must be of a version that moc was tested with.",) if is_moc else (),
        library="peft",
    )


def _tolerance(trained: LoadedRun) -> float | None:
    """How far peft's own LoRA may be off: its products are in float32 where ours are in bfloat16,
    and on some CPUs those of 4-bit weights the other way round.
    """
    half = trained.dtype == "bfloat16" or trained.quantization is not None
    return parity.TOLERANCE["bfloat16"] if half else None


def _key(name: str) -> str:
    """A parameter's name in peft's file: without the adapter's name."""
    if name.startswith(_PREFIX):
        return name
    if name.startswith("modules."):
        return _PREFIX + name.removeprefix("modules.")
    return f"{_PREFIX}moc.moc_mixtures.{name}"


def _moc(trained: LoadedRun, state: dict[str, Tensor]) -> dict[str, Any]:
    silence_notice()
    from moc_cli.peft import NAME, MocConfig, state_hash

    config = MocConfig(
        method=trained.recipe.method.model_dump(mode="json"),
        seed=trained.recipe.seed,
        modules_to_save=trained.adapter_config["modules"] or None,
        base_weights_sha256=trained.weights_hash,
        base_fingerprint=trained.base["base_fingerprint"],
        id2label=trained.base.get("id2label"),
        pad_token_id=pooling_token(trained.adapted.model),
        state_sha256=state_hash(state),
        inference_mode=True,
    )
    plain: dict[str, Any] = to_plain(config.to_dict())
    return plain | _facts(trained) | {"peft_type": NAME}


def _low_rank(trained: LoadedRun) -> dict[str, Any]:
    fields = trained.adapted.adapter_config()
    own = ("method", "modules", "pad_token_id")
    return {key: value for key, value in fields.items() if key not in own} | {
        **_facts(trained),
        "modules_to_save": fields["modules"] or None,
        "inference_mode": True,
    }


def _facts(trained: LoadedRun) -> dict[str, Any]:
    """What peft's configs say of the base."""
    return {
        "base_model_name_or_path": trained.recipe.model.model_name_or_path,
        "revision": trained.recipe.model.revision,
        "task_type": trained.kind.head.task_type,
    }
