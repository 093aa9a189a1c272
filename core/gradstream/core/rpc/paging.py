"""Paging of lists that do not fit in one message, newest entry first."""

from __future__ import annotations

from collections.abc import Sequence

from gradstream.core.errors import ConfigError
from gradstream.core.rpc.channel import MAX_MESSAGE_BYTES

MAX_PAGE_BYTES = MAX_MESSAGE_BYTES - (512 << 10)
"""Size limit of a page. Only a page with a single entry may be larger."""


def start_of_page(keys: Sequence[str], page_token: str) -> int:
    """The index in `keys` of a page's first entry.

    A page token is the key of the entry before the page. Entries that were added later come before that entry.
    Raises ConfigError for a token that is not a key.
    """
    if not page_token:
        return 0
    try:
        return keys.index(page_token) + 1
    except ValueError:
        raise ConfigError(f"there is no page after '{page_token[:100]}'; list from the beginning") from None
