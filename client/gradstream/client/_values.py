"""The base of what the client returns: frozen values, with datetimes, timedeltas and enums in place of the wire's
numbers.

Every type has `to_dict`, which gives what `json.dumps` takes: times as ISO 8601 in UTC, durations in seconds (their
keys end in `_seconds`), enums as their lower-case names, and numbers that JSON cannot write (NaN, infinity) as null.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any


class Value:
    """Base of all results: to_dict."""

    def to_dict(self) -> dict[str, Any]:
        """This value as what `json.dumps` takes."""
        assert dataclasses.is_dataclass(self)
        result: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            key = f"{field.name}_seconds" if "timedelta" in str(field.type) else field.name
            result[key] = plain(value)
        return result


def plain(value: Any) -> Any:
    if isinstance(value, Value):
        return value.to_dict()
    if isinstance(value, datetime):
        return value.isoformat(timespec="milliseconds")
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, StrEnum):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def time_of(unix_ms: int) -> datetime:
    try:
        return datetime.fromtimestamp(unix_ms / 1000, UTC)
    except (OverflowError, ValueError, OSError):
        return datetime.fromtimestamp(0, UTC)


def time_or_none(unix_ms: int) -> datetime | None:
    return time_of(unix_ms) if unix_ms else None


def duration_of(seconds: float) -> timedelta | None:
    try:
        return timedelta(seconds=seconds)
    except (OverflowError, ValueError):
        return None


def unix_ms_of(time: datetime | None) -> int:
    """A time as Unix milliseconds, at least 1; 0 for None. A time without a zone is local."""
    return max(1, int(time.timestamp() * 1000)) if time is not None else 0
