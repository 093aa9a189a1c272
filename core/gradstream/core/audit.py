"""The audit log: who made which call that changes or hands out something, and who was refused one.

A file of JSON lines in a service's state directory. It is only added to; at 64 MiB it becomes audit.1.jsonl, and
a new one begins.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from gradstream.core.guard import AuditEvent
from gradstream.core.log import get_logger

log = get_logger()

FILE_NAME = "audit.jsonl"
OLD_FILE_NAME = "audit.1.jsonl"
MAX_BYTES = 64 << 20


class AuditLog:
    """Adds events to the file. A full disk costs lines of the log, not the cluster's work."""

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES):
        self.path = directory / FILE_NAME
        self._max_bytes = max_bytes
        self._failed = False

    def note(self, event: AuditEvent) -> None:
        """Write an event."""
        line = json.dumps(dataclasses.asdict(event)) + "\n"
        try:
            if self.path.exists() and self.path.stat().st_size >= self._max_bytes:
                self.path.replace(self.path.with_name(OLD_FILE_NAME))
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "a", encoding="utf-8") as stream:
                stream.write(line)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("the audit log cannot be written", path=str(self.path), cause=error.strerror)
            self._failed = True
