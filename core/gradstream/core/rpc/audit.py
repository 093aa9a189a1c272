"""The audit log: calls that change something or hand something out, refused calls, and their callers.

The log is files of JSON lines in a service's state directory. Lines are only appended to audit.jsonl. At 64 MiB it
becomes audit.1.jsonl, audit.1.jsonl becomes audit.2.jsonl and so on; the oldest of 16 files is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from pathlib import Path

from gradstream.core.log import get_logger
from gradstream.core.rpc.refusals import AuditEvent

log = get_logger()

FILE_NAME = "audit.jsonl"
MAX_BYTES = 64 << 20
NUM_OLD_FILES = 15
"""Number of old files. Together with the current one they take at most 1 GiB."""


class AuditLog:
    """The writer of the audit log. On a full disk lines are lost, but the cluster keeps working."""

    def __init__(self, directory: Path, max_bytes: int = MAX_BYTES, num_old_files: int = NUM_OLD_FILES):
        self.path = directory / FILE_NAME
        self._max_bytes = max_bytes
        self._num_old_files = num_old_files
        self._failed = False

    def note(self, event: AuditEvent) -> None:
        """Write an event."""
        line = json.dumps(dataclasses.asdict(event)) + "\n"
        try:
            if self.path.exists() and self.path.stat().st_size >= self._max_bytes:
                self._rotate()
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(descriptor, "a", encoding="utf-8") as stream:
                stream.write(line)
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("the audit log cannot be written", path=str(self.path), cause=error.strerror)
            self._failed = True

    def _rotate(self) -> None:
        for number in range(self._num_old_files, 1, -1):
            with contextlib.suppress(FileNotFoundError):
                self._old(number - 1).replace(self._old(number))
        self.path.replace(self._old(1))

    def _old(self, number: int) -> Path:
        return self.path.with_name(f"audit.{number}.jsonl")
