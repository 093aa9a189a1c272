"""The boundary around parsers written in other languages: tokenizers and safetensors (Rust), pyarrow and zstd (C++, C),
and jinja templates, which are programs of other people.

Rust code that panics raises `PanicException`, which is no `Exception`: `except Exception` does not catch it, a task
ends without a word, and gRPC leaves the call unanswered. Inside this boundary a panic is an error like any other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from gradstream.core.errors import DataError, GradstreamError, one_line

MAX_CAUSE_CHARACTERS = 300
# Every other BaseException means that code failed. These four are how Python ends a program, a generator or a task.
_ENDINGS = (KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError)

Refuse = Callable[[str], GradstreamError]
"""Makes the error for people from the parser's own words."""


def is_panic(error: BaseException) -> bool:
    """Whether `error` is a failure that `except Exception` lets pass."""
    return not isinstance(error, (Exception, *_ENDINGS))


def panic_error(panic: BaseException) -> DataError:
    """A panic as an error with one line, where nothing says more about the data that the parser met."""
    return DataError(f"a parser crashed on its input ({cause_of(panic)}); get the file again, or leave it out")


def cause_of(error: BaseException) -> str:
    """The words of a parser on one line, shortened."""
    return one_line(error)[:MAX_CAUSE_CHARACTERS]


@contextmanager
def panics_caught() -> Iterator[None]:
    """Raise DataError for a panic inside; everything else passes."""
    try:
        yield
    except BaseException as error:
        if is_panic(error):
            raise panic_error(error) from None
        raise


@contextmanager
def parsing(refuse: Refuse) -> Iterator[None]:
    """Whatever a parser raises inside, panics included, becomes the error that `refuse` makes of its words. Errors of
    gradstream pass as they are."""
    try:
        yield
    except GradstreamError:
        raise
    except BaseException as error:
        if isinstance(error, _ENDINGS):
            raise
        raise refuse(cause_of(error)) from None


class Guarded:
    """An object of another language whose methods are called inside `parsing(refuse)`."""

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
