"""What the audit log is told of refused calls: the first of a kind at once, those like it in one line a minute.

Refusals are alike that have the caller, the host, the call and the class of the error in common. So nobody can push
older events out of the log with calls that are refused. Pure: the clock is an argument.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

WINDOW_SECONDS = 60.0
"""How long those like the first are gathered."""
MAX_KINDS = 512
"""Kinds at the same time; what is beyond them is gathered as one kind, of many callers."""
MANY = "many callers"


@dataclass(frozen=True)
class AuditEvent:
    """That somebody made a call that is noted, or was refused one."""

    unix_ms: int
    call: str
    caller: str
    """Name and role, as the certificate says."""
    peer: str
    subject: str
    """The job or fine-tuning that it was about, where the request names one; the request of a refused call is not
    read."""
    outcome: str
    """"ok", or why it was refused or failed, in one line."""
    times: int = 1
    """How many alike it stands for, the last of them at `unix_ms`."""


@dataclass
class _Kind:
    began: float
    last: AuditEvent
    num_more: int = 0


class Refusals:
    """Gathers refusals that are alike. Times are Unix seconds."""

    def __init__(self, window_seconds: float = WINDOW_SECONDS, max_kinds: int = MAX_KINDS):
        self._window_seconds = window_seconds
        self._max_kinds = max_kinds
        self._kinds: dict[tuple[str, ...], _Kind] = {}

    def add(self, event: AuditEvent, error: str) -> list[AuditEvent]:
        """Take a refusal with an error of a class; what is to be noted now."""
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
        """What was gathered for a whole window, one event a kind."""
        over = [key for key, kind in self._kinds.items() if now - kind.began >= self._window_seconds]
        return self._take(over)

    def rest(self) -> list[AuditEvent]:
        """All that was gathered."""
        return self._take(list(self._kinds))

    def _take(self, keys: list[tuple[str, ...]]) -> list[AuditEvent]:
        kinds = [self._kinds.pop(key) for key in keys]
        return [dataclasses.replace(kind.last, times=kind.num_more) for kind in kinds if kind.num_more]
