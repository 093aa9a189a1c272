"""Backoff between retries, and streams that are cancelled when their reader leaves them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gradstream.core.rpc.channel import C


@contextmanager
def cancelling(call: C) -> Iterator[C]:
    """Read a call's responses inside the block, and cancel the call when the block ends.

    A call that is neither read to its end nor cancelled stays open, and so does its connection.
    """
    try:
        yield call
    finally:
        call.cancel()


class Backoff:
    """Endless jittered exponential backoff, in seconds."""

    def __init__(
        self,
        first_seconds: float = 0.1,
        last_seconds: float = 3.0,
        uniform: Callable[[float, float], float] = random.uniform,
    ):
        self._first = first_seconds
        self._last = last_seconds
        self._uniform = uniform
        self._failures = 0

    def reset(self) -> None:
        """Start again from the first delay."""
        self._failures = 0

    def next(self) -> float:
        """Seconds to wait before the next attempt."""
        ceiling = min(self._last, self._first * 2 ** min(self._failures, 20))
        self._failures += 1
        return self._uniform(ceiling / 2, ceiling)
