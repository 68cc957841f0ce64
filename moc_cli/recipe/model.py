"""The section `model` of a recipe: the frozen base, and how it is loaded."""

from typing import Literal

from pydantic import Field

from moc_cli.recipe.types import Section, Text


class ModelSection(Section):
    """The frozen model."""

    model_name_or_path: Text = Field(
        description="hub id, local folder, or builtin:<name> for a model inside this package"
    )
    revision: Text | None = Field(default=None, description="branch, tag or commit on the hub")
    tokenizer_name: Text | None = Field(
        default=None, description="hub id or local folder; null: that of the model"
    )
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2"] | None = Field(
        default=None, description="attention code of transformers; null: its own choice"
    )
    load_in_4bit: bool = Field(
        default=False,
        description="keep the linear weights of the layers in 4 bits, by bitsandbytes; products "
        "are made in the type of train.bf16",
    )
    load_in_8bit: bool = Field(
        default=False, description="keep the linear weights of the layers in 8 bits"
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        default="nf4", description="for load_in_4bit: the 16 numbers that a weight can be"
    )
    bnb_4bit_use_double_quant: bool = Field(
        default=True, description="for load_in_4bit: the scales are quantised too"
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run Python code from the model's folder; each call must allow it with "
        "--trust-remote-code",
    )
