"""adapter_config.json: what an adapter folder says of itself, as a closed schema.

Format 2 also carries a hash of the config itself, the seed, a fingerprint of the base in memory and
the kind of model; format 1 lacks them and is still read.
"""

from typing import Annotated, Any, Literal, TypeGuard

from pydantic import Field, TypeAdapter, ValidationError

from moc_cli.errors import RecipeError, RunError
from moc_cli.recipe.messages import explain
from moc_cli.recipe.methods import (
    REWRITING_INITS,
    DoraMethod,
    LoraMethod,
    MethodConfig,
    MethodSection,
    PlacementSection,
)
from moc_cli.recipe.tasks import HeadName
from moc_cli.recipe.types import LARGEST, Count, Positive, Section, Seed, Text

Sha = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[Text, Field(max_length=1000)]

PadToken = Annotated[int, Field(strict=True, ge=-1, le=LARGEST)]  # some configs say -1: none


class LayerPlace(Section):
    """Where MoLEx mixes: the list of layers alone."""

    layers: Text = Field(description="path of the list of layers inside the base model")
    causal: bool = Field(description="true for decoders, false for encoders")


class Fingerprints(Section):
    """Hashes of samples of the base's parameters, rounded to each of two types; `unquantized_`: of
    those outside of linear weights.
    """

    bfloat16: Sha | None = None
    float16: Sha | None = None
    unquantized_bfloat16: Sha | None = None
    unquantized_float16: Sha | None = None


class BaseQuantization(Section):
    """How the base's linear weights were kept in training; arguments of BitsAndBytesConfig."""

    load_in_4bit: bool = Field(default=False, description="in 4 bits")
    load_in_8bit: bool = Field(default=False, description="in 8 bits")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(default="nf4", description="of 4 bits")
    bnb_4bit_use_double_quant: bool = Field(default=True, description="of 4 bits")


class AdapterConfig(Section):
    """Everything an adapter folder says; with peft's own fields for lora and dora."""

    format: Literal[1, 2] = Field(description="version of this file")
    method: MethodSection = Field(description="what was trained")
    placement: PlacementSection | LayerPlace | None = Field(
        default=None, description="where it sits"
    )
    modules: list[Name] = Field(default=[], description="modules saved whole, as a classifier")
    base_model_name_or_path: Name = Field(description="the base, as it was named in training")
    revision: Name | None = Field(default=None, description="the base's revision on the hub")
    base_weights_sha256: Sha | None = Field(
        description="of the base's tensors; in older files, of its weight files"
    )
    base_fingerprint: Fingerprints | None = Field(default=None, description="of the base in memory")
    base_quantization: BaseQuantization | None = Field(
        default=None, description="of the base in memory; null: none"
    )
    kind: HeadName | None = Field(default=None, description="model head")
    num_labels: Positive | None = Field(default=None, description="classes")
    problem_type: Name | None = Field(default=None, description="as transformers names it")
    id2label: dict[str, Name] | None = Field(default=None, description="names of the classes")
    pad_token_id: PadToken | None = Field(
        default=None, description="of a classifier that is a decoder: it pools the last other token"
    )
    seed: Seed | None = Field(default=None, description="seed with which the method was placed")
    step: Count | None = Field(default=None, description="training step of the payload")
    payload_sha256: Sha = Field(description="of the payload file")
    config_sha256: Sha | None = Field(default=None, description="of everything else in this file")


def parse_adapter(raw: dict[str, Any], source: str) -> tuple[AdapterConfig, dict[str, Any]]:
    """Return the checked config, and peft's fields; raises RunError naming `source`."""
    adapter_fields = {key: value for key, value in raw.items() if key in AdapterConfig.model_fields}
    peft_fields = {key: value for key, value in raw.items() if key not in adapter_fields}
    method = raw.get("method")
    name = method.get("name") if isinstance(method, dict) else method
    if name not in ("lora", "dora"):
        adapter_fields, peft_fields = raw, {}
    try:
        return AdapterConfig.model_validate(adapter_fields), peft_fields
    except ValidationError as error:
        details = error.errors(include_url=False)
        shown = "; ".join(dict.fromkeys(_sentence(detail) for detail in details[:3]))
        raise RunError(f"{source} is not one that this version reads: {shown}") from error


def _sentence(detail: Any) -> str:
    if detail["loc"][:1] == ("method",):
        path, message, _ = explain(detail)
        return f"{'.'.join(path)}: {message}"
    key = ".".join(str(part) for part in detail["loc"])[:80]
    if detail["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    return f"{key}: {detail['msg']}"


def make_method(name: str, options: dict[str, Any]) -> MethodConfig:
    """Return a method's section from keyword options, defaults filled in.

    Raises RecipeError with every mistake in them: unknown keys, wrong types, values out of bounds.
    """
    try:
        section: MethodConfig = TypeAdapter(MethodSection).validate_python(
            {"name": name, **options}
        )
        return section
    except ValidationError as error:
        details = error.errors(include_url=False)
        mistakes = [explain({**detail, "loc": ("method", *detail["loc"])}) for detail in details]
        lines = (f"{'.'.join(path)}: {message}" for path, message, _ in mistakes)
        raise RecipeError("\n".join(dict.fromkeys(lines))) from error


def drawn_from_the_base(method: MethodConfig) -> TypeGuard[LoraMethod | DoraMethod]:
    """Whether placing the method rewrites the base from a seed (PiSSA and OLoRA do)."""
    return isinstance(method, LoraMethod | DoraMethod) and method.init.startswith(REWRITING_INITS)
