"""Writes the files of an export as they arrive: into a directory beside the wanted one, renamed when all is there.

A service's bytes are not trusted: a file's name must be a plain name, the pieces must come in a row, and their
sizes must add up to what was announced.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import BinaryIO, Protocol

from gradstream.client._job_types import ExportProgress
from gradstream.core.errors import CheckpointError, ConfigError, ProtocolError

_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
MAX_FILES = 10_000


class Piece(Protocol):
    """What ExportCheckpoint and ExportFineTuning answer with."""

    file: str
    file_bytes: int
    payload: bytes


class ExportWriter:
    """Takes the pieces of an export. Use `write` for each, then `finish`; `discard` when anything failed."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).expanduser().absolute()
        if self.directory.is_dir() and any(self.directory.iterdir()):
            raise ConfigError(f"{self.directory} is not empty; export to a new directory or empty it first")
        if self.directory.exists() and not self.directory.is_dir():
            raise ConfigError(f"{self.directory} is a file; export to a new directory")
        try:
            self.directory.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = Path(
                tempfile.mkdtemp(prefix=f".{self.directory.name}.partial-", dir=self.directory.parent)
            )
        except OSError as error:
            raise ConfigError(
                f"cannot write in {self.directory.parent} ({error.strerror}); choose another directory"
            ) from None
        self._seen: set[str] = set()
        self._file: BinaryIO | None = None
        self._name = ""
        self._expected_bytes = 0
        self._received_bytes = 0
        self._total_bytes = 0

    def write(self, piece: Piece) -> ExportProgress:
        """Write one piece. Raises ProtocolError when it does not fit, CheckpointError when the disk refuses it."""
        try:
            if piece.file != self._name or self._file is None:
                self._finish_file()
                self._start_file(piece)
            assert self._file is not None
            self._received_bytes += len(piece.payload)
            self._total_bytes += len(piece.payload)
            if piece.file_bytes != self._expected_bytes or self._received_bytes > self._expected_bytes:
                raise ProtocolError(
                    f"export of '{self._name}': more bytes came than the {self._expected_bytes} announced; "
                    f"do both sides run the same gradstream version?"
                )
            self._file.write(piece.payload)
        except OSError as error:
            raise CheckpointError(
                f"cannot write '{self._name}' of the export in {self.directory.parent} ({error.strerror}); "
                f"free disk space or choose another directory"
            ) from None
        return ExportProgress(self._name, self._received_bytes, self._expected_bytes, self._total_bytes)

    def finish(self) -> Path:
        """Put the complete directory into place. Raises ProtocolError when something is missing."""
        try:
            self._finish_file()
            if not self._seen:
                raise ProtocolError("the export has no files; is there a checkpoint?")
            self._temporary.chmod(0o777 & ~_umask())
            os.rename(self._temporary, self.directory)
        except OSError as error:
            raise CheckpointError(f"cannot put the export into {self.directory} ({error.strerror})") from None
        return self.directory

    def discard(self) -> None:
        """Remove what was written, unless it is in place."""
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _start_file(self, piece: Piece) -> None:
        if not _PLAIN_NAME.fullmatch(piece.file):
            raise ProtocolError(f"the export names a file {piece.file[:80]!r}, which is not a plain file name")
        if piece.file in self._seen or len(self._seen) >= MAX_FILES:
            raise ProtocolError(f"the export sends the file '{piece.file}' twice or has too many files")
        self._seen.add(piece.file)
        self._file = (self._temporary / piece.file).open("xb")
        self._name = piece.file
        self._expected_bytes = piece.file_bytes
        self._received_bytes = 0

    def _finish_file(self) -> None:
        if self._file is None:
            return
        if self._received_bytes != self._expected_bytes:
            raise ProtocolError(
                f"export of '{self._name}': {self._received_bytes} bytes came, {self._expected_bytes} were announced; "
                f"export again"
            )
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
