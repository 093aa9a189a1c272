"""The base of every part of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0, lt=2**63)]
NonNegative = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of every part of a recipe: frozen, and strict about unknown keys.

    Infinities and NaN are refused: JSON, in which a recipe travels, has no word for them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
