"""The base of every part of a recipe."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from gradstream.core.errors import nearest

Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0)]


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


def explain(error: ValidationError, recipe: type[Section]) -> str:
    """The first problem of a `recipe` as one line, with the nearest key where a key is unknown."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        section: Any = recipe
        for part in problem["loc"][:-1]:
            if part not in section.model_fields:
                continue  # a place in a list
            annotation = section.model_fields[part].annotation
            section = next(
                (
                    a
                    for a in getattr(annotation, "__args__", (annotation,))
                    if isinstance(a, type) and issubclass(a, Section)
                ),
                Section,
            )
        return f"unknown key '{where}'{nearest(str(problem['loc'][-1]), section.model_fields)}{more}"
    if problem["type"] == "missing":
        return f"'{where}' is missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return f"{message}{more}"
    return f"'{where}': {message[0].lower()}{message[1:]}, not {problem['input']!r}{more}"
