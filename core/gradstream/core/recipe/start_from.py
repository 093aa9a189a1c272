"""Where a job's first weights come from, if not from its seed: the checkpoint of another job."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, field_validator, model_validator

from gradstream.core.data.manifest import Digest
from gradstream.core.recipe.section import Section

JOB = "job:"
_JOB = re.compile(r"job:([a-z0-9][a-z0-9._-]{0,127})(?:@([0-9]{1,18}))?")


class StartFrom(Section):
    """The checkpoint that version 0 is made of. `start_from: job:ID` is short for `start_from: {weights: job:ID}`."""

    weights: str = Field(description="a job's checkpoint as job:ID or job:ID@VERSION, or the directory of a checkpoint")
    optimizer: bool = Field(default=False, description="take the optimizer's state too, and not begin it with zeros")
    checkpoint: str | None = Field(default=None, description="written at submission: the directory of the checkpoint")
    state_sha256: Digest | None = Field(default=None, description="written at submission: the hash of its state")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, tree: Any) -> Any:
        return {"weights": tree} if isinstance(tree, str) else tree

    @field_validator("weights")
    @classmethod
    def _named(cls, weights: str) -> str:
        if not weights.strip():
            raise ValueError(
                "start_from.weights is empty; write job:ID, job:ID@VERSION or the directory of a checkpoint"
            )
        if weights.startswith(JOB) and _JOB.fullmatch(weights) is None:
            raise ValueError(f"start_from.weights '{weights[:100]}' is not of the form job:ID or job:ID@VERSION")
        return weights

    @property
    def job(self) -> tuple[str, int | None] | None:
        """The job and the version that `weights` names, None for its last one; None for a directory."""
        match = _JOB.fullmatch(self.weights)
        return None if match is None else (match[1], int(match[2]) if match[2] is not None else None)

    @property
    def title(self) -> str:
        """The origin of the weights, for people."""
        version = (self.checkpoint or "").rpartition("/step-")[2].lstrip("0") or "0"
        named = f"{self.weights}@{version}" if self.job is not None and self.job[1] is None else self.weights
        return f"{named}, with its optimizer's state" if self.optimizer else named
