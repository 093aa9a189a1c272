"""What happens when the reader of a command's output goes away (`| head`): the command ends, with exit code 141.

rich and typer each take the operating system's error for themselves and end with 1. So it gets another name before
either of them sees it, which no `except Exception` on the way takes for an error of the command's own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

EXIT_CODE = 141
"""128 + SIGPIPE, as a shell has it for programs that the signal ends."""


class ReaderLeftError(BaseException):
    """Nobody reads what is written any more."""


class _Watched:
    """A stream whose reader may leave."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As of the stream. Raises ReaderLeftError."""
        with _renamed():
            return self._stream.write(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """As of the stream. Raises ReaderLeftError."""
        with _renamed():
            self._stream.writelines(lines)

    def flush(self) -> None:
        """As of the stream. Raises ReaderLeftError."""
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
    """Have stdout and stderr raise ReaderLeftError where the other end is closed. Passed on, neither is written to any
    more: the interpreter must not try once again when it ends."""
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
