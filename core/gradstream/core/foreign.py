"""Error handling around foreign parsers and programs.

Foreign are the parsers written in other languages (tokenizers and safetensors in Rust, pyarrow in C++, zstd in C) and
jinja templates, which are programs of other people.

A panic in Rust raises `PanicException`, which is not an `Exception`: `except Exception` does not catch it, a task ends
without a log line, and gRPC leaves the call unanswered. The functions here turn a panic into an ordinary error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from gradstream.core.errors import DataError, GradstreamError, one_line

MAX_CAUSE_CHARACTERS = 300
# With these four Python ends a program, a generator or a task. Every other BaseException means that code failed.
_ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)

Refuse = Callable[[str], GradstreamError]
"""Makes the error for people from the parser's message."""


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a failure that `except Exception` does not catch."""
    return not isinstance(error, (Exception, *_ENDINGS))


def panic_error(panic: BaseException) -> DataError:
    """The error for a panic where the caller does not know which data the parser was reading."""
    return DataError(f"a parser crashed on its input ({cause_of(panic)}); get the file again, or leave it out")


def cause_of(error: BaseException) -> str:
    """A parser's message on one line, shortened."""
    return one_line(error)[:MAX_CAUSE_CHARACTERS]


@contextmanager
def panics_caught() -> Iterator[None]:
    """Raise DataError for a panic inside the block; other errors pass unchanged."""
    try:
        yield
    except BaseException as error:
        if is_panic(error):
            raise panic_error(error) from None
        raise


@contextmanager
def parsing(refuse: Refuse) -> Iterator[None]:
    """Replace an error that a parser raises inside the block, panics included, by the error that `refuse` makes.

    Errors of gradstream pass unchanged.
    """
    try:
        yield
    except GradstreamError:
        raise
    except BaseException as error:
        if isinstance(error, _ENDINGS):
            raise
        raise refuse(cause_of(error)) from None


class Guarded:
    """A wrapper that calls the methods of a foreign object inside `parsing(refuse)`."""

    def __init__(self, inner: Any, refuse: Refuse):
        object.__setattr__(self, "_inner", inner)
        object.__setattr__(self, "_refuse", refuse)

    def __getattr__(self, name: str) -> Any:
        refuse = self._refuse
        with parsing(refuse):
            value = getattr(self._inner, name)
        if not callable(value):
            return value

        @wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            with parsing(refuse):
                return value(*args, **kwargs)

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        with parsing(self._refuse):
            setattr(self._inner, name, value)
