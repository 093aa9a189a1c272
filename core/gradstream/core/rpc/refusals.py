"""Refused calls for the audit log: the first of a kind at once, similar ones in one line a minute.

Refusals with the same caller, host, call and error class are of one kind. Gathering them prevents a caller from pushing
older events out of the log with refused calls. Pure: the clock is an argument.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

WINDOW_SECONDS = 60.0
"""Time for which refusals of one kind are gathered."""
MAX_KINDS = 512
"""Maximum number of kinds at the same time. Further refusals are gathered as one kind, of many callers."""
MANY = "many callers"


@dataclass(frozen=True)
class AuditEvent:
    """An entry of the audit log: an audited call, or refused calls."""

    unix_ms: int
    call: str
    caller: str
    """The name and role in the certificate."""
    peer: str
    subject: str
    """The job or fine-tuning that the request names; empty for a refused call, whose request is not read."""
    outcome: str
    """"ok", or the reason of the refusal or failure, in one line."""
    times: int = 1
    """Number of similar calls that the entry stands for; the last one was at `unix_ms`."""


@dataclass
class _Kind:
    began: float
    last: AuditEvent
    num_more: int = 0


class Refusals:
    """Gathers refusals of one kind. Times are Unix seconds."""

    def __init__(self, window_seconds: float = WINDOW_SECONDS, max_kinds: int = MAX_KINDS):
        self._window_seconds = window_seconds
        self._max_kinds = max_kinds
        self._kinds: dict[tuple[str, ...], _Kind] = {}

    def add(self, event: AuditEvent, error: str) -> list[AuditEvent]:
        """Add a refusal with the error class `error`; return the entries to write now."""
        key: tuple[str, ...] = (event.caller, event.peer, event.call, error)
        if key not in self._kinds and len(self._kinds) >= self._max_kinds:
            key, event = (MANY,), dataclasses.replace(event, caller=MANY, peer="")
        kind = self._kinds.get(key)
        if kind is None:
            self._kinds[key] = _Kind(event.unix_ms / 1000, event)
            return [event]
        kind.last = event
        kind.num_more += 1
        return []

    def due(self, now: float) -> list[AuditEvent]:
        """Remove and return the refusals that were gathered for a whole window, as one entry for each kind."""
        over = [key for key, kind in self._kinds.items() if now - kind.began >= self._window_seconds]
        return self._take(over)

    def rest(self) -> list[AuditEvent]:
        """Remove and return all gathered refusals, as one entry for each kind."""
        return self._take(list(self._kinds))

    def _take(self, keys: list[tuple[str, ...]]) -> list[AuditEvent]:
        kinds = [self._kinds.pop(key) for key in keys]
        return [dataclasses.replace(kind.last, times=kind.num_more) for kind in kinds if kind.num_more]
