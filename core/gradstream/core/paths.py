"""Where the paths of a recipe may lead.

Whoever may submit names paths that services then read and write. What a service can open but a submitter must not see,
its own key for one, is kept out of reach by GRADSTREAM_PATHS: directories and URLs, separated by commas, below which
every path of a recipe must lie. Without it, any path will do.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from gradstream.core.errors import ConfigError

VARIABLE = "GRADSTREAM_PATHS"
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")


class AllowedPaths:
    """The prefixes below which paths may lie; none at all: anywhere."""

    def __init__(self, prefixes: Iterable[str] = ()):
        self._prefixes = [prefix.strip() for prefix in prefixes if prefix.strip()]

    @classmethod
    def of_environment(cls, *more: str) -> AllowedPaths:
        """What GRADSTREAM_PATHS says, and `more`, which do not matter where it says nothing."""
        prefixes = [prefix for prefix in os.environ.get(VARIABLE, "").split(",") if prefix.strip()]
        return cls([*prefixes, *more] if prefixes else [])

    def check(self, key: str, path: str | None) -> None:
        """Raise ConfigError, which names the recipe's key, for a path that leads elsewhere. Links are followed."""
        if path is None or not self._prefixes or any(_is_below(path, prefix) for prefix in self._prefixes):
            return
        raise ConfigError(
            f"{key} {path} is not below {' or '.join(self._prefixes)}, where this cluster's paths must lie; put it "
            f"there"
        )


def _is_below(path: str, prefix: str) -> bool:
    if "::" in path:  # fsspec's chains open one path through another
        return False
    path, prefix = path.removeprefix("file://"), prefix.removeprefix("file://")
    if _URL.match(path):
        return ".." not in path.split("/") and f"{path}/".startswith(f"{prefix.rstrip('/')}/")
    if _URL.match(prefix) or "\0" in path:
        return False
    try:
        found, root = os.path.realpath(os.path.expanduser(path)), os.path.realpath(prefix)
    except (OSError, ValueError):
        return False
    return os.path.commonpath([found, root]) == root
