"""The types of value in a recipe: every section is closed and frozen, every number has bounds."""

import os
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
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
    def _normalize(cls, value: Any) -> Any:
        """Read an empty section as one with all defaults."""
        return {} if value is None else value


def section(description: str) -> Any:
    """Return the field for a section whose keys all have defaults."""
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


def refuse_nul(value: str) -> str:
    """Return a text unless it holds the character NUL, which no path may have."""
    if "\0" in value:
        raise PydanticCustomError("nul", "a text without the character NUL is needed")
    return value


def expand_home(value: str) -> str:
    """Return a path with `~` as the user's home; the shell does not see it in a file."""
    path = os.path.expanduser(value)
    if path.startswith("~"):
        raise PydanticCustomError("home", "no user of this name has a home folder")
    return path


_NUMBER = BeforeValidator(refuse_bool)

# Beyond these no machine can follow: whole numbers of tensors' sizes, and floats that stay finite
# in single precision when they are multiplied.
LARGEST = 2**31 - 1
HUGE = 1e30
LAST_SEED = 2**32 - 1

Count = Annotated[int, Field(ge=0, le=LARGEST), _NUMBER]
Positive = Annotated[int, Field(ge=1, le=LARGEST), _NUMBER]
Threads = Annotated[int, Field(ge=1, le=1024), _NUMBER]
Width = Annotated[int, Field(ge=1, le=65536), _NUMBER]
Seed = Annotated[int, Field(ge=0, le=LAST_SEED), _NUMBER]
StepLimit = Annotated[int, Field(ge=-1, le=LARGEST), _NUMBER]
RowLength = Annotated[int, Field(ge=8, le=LARGEST), _NUMBER]
AtLeastZero = Annotated[float, Field(ge=0, lt=HUGE), _NUMBER]
AboveZero = Annotated[float, Field(gt=0, lt=HUGE), _NUMBER]
Share = Annotated[float, Field(ge=0, le=1), _NUMBER]
OpenShare = Annotated[float, Field(gt=0, lt=1), _NUMBER]
PositiveShare = Annotated[float, Field(gt=0, le=1), _NUMBER]
BelowOne = Annotated[float, Field(ge=0, lt=1), _NUMBER]
HeldOut = Count | Annotated[float, Field(gt=0, lt=1), _NUMBER]
Counts = Annotated[list[Count], Field(min_length=1)]
Text = Annotated[str, Field(min_length=1), AfterValidator(refuse_nul)]
Folder = Annotated[Text, AfterValidator(expand_home)]
TextList = Annotated[list[Text], Field(min_length=1)]
Texts = Annotated[TextList, BeforeValidator(one_or_more, json_schema_input_type=Text | TextList)]
