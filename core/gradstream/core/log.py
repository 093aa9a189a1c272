"""Logging: structlog to stderr, and a bounded buffer of lines that heartbeats carry to the coordinator."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import deque
from collections.abc import MutableMapping
from typing import Any, TextIO, cast

import structlog

from gradstream.core.shown import shown
from gradstream.proto.v1 import coordinator_pb2

MAX_LINES_PER_HEARTBEAT = 200


class LogBuffer:
    """The newest log lines that no heartbeat has taken yet. When the buffer is full, the oldest line is dropped."""

    def __init__(self, max_lines: int = 1000):
        self._lines: deque[coordinator_pb2.LogLine] = deque(maxlen=max_lines)

    def take(self) -> list[coordinator_pb2.LogLine]:
        """Remove and return the oldest lines, at most MAX_LINES_PER_HEARTBEAT."""
        return [self._lines.popleft() for _ in range(min(len(self._lines), MAX_LINES_PER_HEARTBEAT))]

    def __call__(self, _: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Copy the line into the buffer (a structlog processor)."""
        fields = {
            key: value for key, value in event.items() if key not in ("event", "level", "timestamp", "job", "node")
        }
        text = " ".join([str(event.get("event", "")), *(f"{key}={value}" for key, value in fields.items())])
        self._lines.append(
            coordinator_pb2.LogLine(
                unix_ms=int(time.time() * 1000), level=method, text=text[:2000], job_id=str(event.get("job", ""))
            )
        )
        return event


def _shown(_: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Write out control characters (a structlog processor): a peer's text must not move the reader's cursor."""
    return {key: shown(value) if isinstance(value, str) else value for key, value in event.items()}


class _Stderr:
    """A stream that looks up sys.stderr at each write, because sys.stderr may change after logging was configured."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def configure(level: str = "info", buffer: LogBuffer | None = None, json_lines: bool | None = None) -> None:
    """Send log lines to stderr as text, or as JSON if `json_lines` is true or GRADSTREAM_LOG_FORMAT is "json"."""
    if json_lines is None:
        json_lines = os.environ.get("GRADSTREAM_LOG_FORMAT") == "json"
    processors: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if json_lines else "%H:%M:%S", utc=json_lines),
    ]
    if buffer is not None:
        processors.append(buffer)
    if json_lines:
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        processors.append(_shown)
        processors.append(structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=0))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=cast(TextIO, _Stderr())),
        cache_logger_on_first_use=False,
    )


def get_logger(**fields: Any) -> Any:
    """A structlog logger with `fields` on every line."""
    return structlog.get_logger(**fields)
