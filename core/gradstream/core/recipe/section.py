"""The base class of every section of a recipe."""

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
    """Base class of every section of a recipe: frozen, and strict about unknown keys.

    Infinities and NaN are refused, because a recipe is sent as JSON, which cannot express them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_truth_for_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a bool where a number is meant: YAML reads `yes` as true, and pydantic reads true as 1."""
        if any(isinstance(item, bool) for item in (value if isinstance(value, list | tuple) else [value])):
            kind = repr(cls.model_fields[str(info.field_name)].annotation)
            if re.search(r"\b(int|float)\b", kind) and "bool" not in kind:
                raise PydanticCustomError("number_type", "input should be a number")
        return value
