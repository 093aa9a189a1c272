"""The base of every part of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Positive = Annotated[int, Field(gt=0, lt=2**63)]
DERIVED = "derived"
NonNegative = Annotated[int, Field(ge=0)]


def derived(how: str) -> dict[str, Any]:
    """The `json_schema_extra` of a key that follows from others where it is not given, as `how` says."""
    return {DERIVED: how}


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and strict about unknown keys.

    Infinities and NaN are refused: JSON, in which a recipe travels, has no word for them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """To pydantic `yes`, which is true in YAML, is also the number 1."""
        if any(isinstance(item, bool) for item in (value if isinstance(value, list | tuple) else [value])):
            kind = repr(cls.model_fields[str(info.field_name)].annotation)
            if re.search(r"\b(int|float)\b", kind) and "bool" not in kind:
                raise PydanticCustomError("number_type", "input should be a number")
        return value
