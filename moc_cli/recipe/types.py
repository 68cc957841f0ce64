"""The kinds of value a recipe holds: every section is closed and frozen, every number bounded."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """One section of a recipe: unknown keys, NaN and infinity are refused, and it is frozen."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        defer_build=True,  # one validator, of the whole recipe, when it is first needed
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """Read a section with nothing under its name as one that leaves all to the defaults."""
        return {} if value is None else value


def section(description: str) -> Any:
    """Return the field of a section whose keys all have defaults."""
    return Field(default={}, validate_default=True, description=description)


def refuse_bool(value: Any) -> Any:
    """Return `value` unless it is true or false, which Python would take for 1 or 0."""
    if isinstance(value, bool):
        raise PydanticCustomError("bool_as_number", "a number is needed")
    return value


def word_no(value: Any) -> Any:
    """Return "no" for false: YAML 1.1 readers turn the word `no` into it."""
    return "no" if value is False else value


def one_or_more(value: Any) -> Any:
    """Return a bare text as a list of one."""
    return [value] if isinstance(value, str) else value


_Int = Annotated[int, BeforeValidator(refuse_bool)]
_Float = Annotated[float, BeforeValidator(refuse_bool)]

Count = Annotated[_Int, Field(ge=0)]
Positive = Annotated[_Int, Field(ge=1)]
Seed = Annotated[_Int, Field(ge=0, le=2**32 - 1)]
StepLimit = Annotated[_Int, Field(ge=-1)]
AtLeastZero = Annotated[_Float, Field(ge=0)]
AboveZero = Annotated[_Float, Field(gt=0)]
Share = Annotated[_Float, Field(ge=0, le=1)]
PositiveShare = Annotated[_Float, Field(gt=0, le=1)]
BelowOne = Annotated[_Float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]
