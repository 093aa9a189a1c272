"""One line of the output of `gradstream doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check. `cure` is what to do if the result is not ok."""

    name: str
    result: Literal["ok", "warn", "fail"]
    message: str
    cure: str = ""
