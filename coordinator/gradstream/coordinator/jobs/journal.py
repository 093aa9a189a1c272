"""Store transitions of jobs: a record and its events are one transaction.

Each transition is stored, then applied in memory, then sent. A transition that could not be stored has not happened and
is due again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from gradstream.coordinator.state.notify import Notifier
from gradstream.coordinator.state.state import JobRecord, State, Trouble
from gradstream.coordinator.timing import unix_ms
from gradstream.core.job_states import ENDED
from gradstream.core.log import get_logger
from gradstream.core.rpc.retry import Backoff
from gradstream.proto.v1 import jobs_pb2

log = get_logger()


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's history."""

    kind: str
    message: str

    def as_item(self) -> jobs_pb2.WatchJobResponse:
        """The event as an item of a history, dated now."""
        event = jobs_pb2.Event(unix_ms=unix_ms(), kind=self.kind, message=self.message)
        return jobs_pb2.WatchJobResponse(event=event)


class Journal:
    """Stores transitions and wakes those who watch the job."""

    def __init__(self, state: State, notifier: Notifier):
        self._state = state
        self._notifier = notifier
        # Whether a job may be queued. An idle cluster then need not read all jobs at every tick.
        self.jobs_changed = True
        # Number of jobs that have ended, by the state in which they ended, since this process began.
        self.num_ended: Counter[jobs_pb2.JobState.ValueType] = Counter()

    def create(self, record: JobRecord, events: Sequence[Event]) -> None:
        """Store a new job with its first events. Raises UnreachableError."""
        items = [event.as_item() for event in events]
        self._state.create_job(record, items)
        self._told(record, items)

    def store(
        self, record: JobRecord, events: Sequence[Event] = (), plan: bytes | None = None, **changes: Any
    ) -> JobRecord:
        """Store a transition of a job; return its new record. Raises UnreachableError and then changes nothing."""
        changed = replace(record, **changes)
        items = [event.as_item() for event in events]
        self._state.store_job(changed, items, plan)
        if changed.state in ENDED and record.state not in ENDED:
            self.num_ended[changed.state] += 1
        self._told(changed, items)
        return changed

    def note(self, job_id: str, kind: str, message: str) -> None:
        """Add an event that belongs to no transition. If it cannot be stored, only the event is lost."""
        log.info(message, job=job_id, kind=kind)
        self._notifier.append(job_id, [Event(kind, message).as_item()])

    def _told(self, record: JobRecord, items: Sequence[jobs_pb2.WatchJobResponse]) -> None:
        self.jobs_changed = True
        for item in items:
            log.info(item.event.message, job=record.job_id, kind=item.event.kind)
        # The end of a job ends every watch.
        self._notifier.changed(record.job_id, None if record.state in ENDED else items)


@dataclass
class Retry:
    """Retries with backoff: why the last attempt failed, since when, and when the next one is due.

    The clock is an argument.
    """

    max_seconds: float
    trouble: Trouble | None = None
    _next_at: float = 0.0
    _backoff: Backoff = field(init=False)

    def __post_init__(self) -> None:
        self._backoff = Backoff(0.1, self.max_seconds)

    def due(self, now: float) -> bool:
        """Whether it is time for an attempt."""
        return self.trouble is None or now >= self._next_at

    def failed(self, cause: str, now: float) -> bool:
        """Note a failed attempt. Return whether its cause is new; only a new cause is logged."""
        before = self.trouble
        self.trouble = Trouble(cause, before.since_unix_ms if before is not None else unix_ms())
        self._next_at = now + self._backoff.next()
        return before is None or before.cause != cause

    def succeeded(self) -> None:
        """Note a successful attempt."""
        self.trouble = None
        self._backoff.reset()
