"""End a command with exit code 141 when the reader of its output closes the pipe (`| head`).

rich and typer catch the operating system's error and end with 1. So this module turns it into another exception before
they see it. This exception is no subclass of Exception, so no `except Exception` catches it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

EXIT_CODE = 141
"""128 + SIGPIPE, a shell's exit code for programs that the signal ends."""


class ReaderLeftError(BaseException):
    """The reader of the output has closed the pipe."""


class _Watched:
    """A stream that raises ReaderLeftError once its reader has closed the pipe."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write to the stream. Raises ReaderLeftError."""
        with _renamed():
            return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines to the stream. Raises ReaderLeftError."""
        with _renamed():
            self._stream.writelines(lines)

    def flush(self) -> None:
        """Flush the stream. Raises ReaderLeftError."""
        with _renamed():
            self._stream.flush()


@contextmanager
def _renamed() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise ReaderLeftError from None


@contextmanager
def watched_output() -> Iterator[None]:
    """Let stdout and stderr raise ReaderLeftError when their reader has closed the pipe.

    After that neither stream is written to, so that the interpreter does not flush them once more at its end.
    """
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Watched(streams[0]), _Watched(streams[1])  # type: ignore[assignment]
    try:
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
    except ReaderLeftError:
        for stream in streams:
            try:
                stream.flush()
            except BrokenPipeError:
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise
