"""One line of what `gradstream doctor` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. `cure` says what to do unless the result is ok."""

    name: str
    result: Literal["ok", "warn", "fail"]
    message: str
    cure: str = ""
