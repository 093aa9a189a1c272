"""Lists that are longer than a message: the newest first, page by page, nothing left out."""

from __future__ import annotations

from collections.abc import Sequence

from gradstream.core.errors import ConfigError
from gradstream.core.rpc.channel import MAX_MESSAGE_BYTES

MAX_PAGE_BYTES = MAX_MESSAGE_BYTES - (512 << 10)
"""A page ends before it is longer; one entry alone may be."""


def start_of_page(keys: Sequence[str], page_token: str) -> int:
    """The index of a page's first entry among the keys of all. A page token is the key of the entry before it; entries
    that are new since come before it. Raises ConfigError for one that was never given out."""
    if not page_token:
        return 0
    try:
        return keys.index(page_token) + 1
    except ValueError:
        raise ConfigError(f"there is no page after '{page_token[:100]}'; list from the beginning") from None
