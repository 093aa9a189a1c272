"""Idempotent requests: a caller that got no answer retries under the same request id, and the request counts once."""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from gradstream.core.errors import ConfigError

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def new_request_id() -> str:
    """Make an id that no other request has."""
    return uuid.uuid4().hex


def checked_request_id(request_id: str) -> str:
    """Return `request_id` if it is well-formed or empty (no id); else raise ConfigError."""
    if request_id and not _REQUEST_ID.fullmatch(request_id):
        raise ConfigError(
            f"request id '{request_id[:80]}' is malformed; use 1 to 64 letters, digits, '.', '_' or '-', or none"
        )
    return request_id


class Requests:
    """The requests that are being served, by id."""

    def __init__(self) -> None:
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def one_at_a_time(self, request_id: str) -> AsyncIterator[None]:
        """Wait until no other request with this id is being served. A request without an id does not wait."""
        lock = self._locks.setdefault(request_id, asyncio.Lock()) if request_id else asyncio.Lock()
        async with lock:
            yield
