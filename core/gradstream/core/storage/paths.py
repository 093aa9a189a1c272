"""Where the paths of a recipe may lead.

A submitter names paths that services then read and write. Without more, a service opens paths of its own machine
alone: a URL would have it connect to a host of the submitter's choice. Two variables say more:

- GRADSTREAM_PATHS: directories and URLs, separated by commas, below which every path of a recipe must lie. So what a
  service can open but a submitter must not see, its own key for one, is out of reach.
- GRADSTREAM_SCHEMES: schemes of URLs, separated by commas, that are opened wherever they lead ("s3,gs").

A path is checked when it is submitted, and every file again when it is opened, by where it really lies: a link may have
been put in its place since.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from urllib.parse import unquote

from gradstream.core.errors import ConfigError

VARIABLE = "GRADSTREAM_PATHS"
SCHEMES_VARIABLE = "GRADSTREAM_SCHEMES"
LOCAL_SCHEMES = ("file", "local")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*):")

# Directories of this process's own, in which it reads what it has written itself.
_own: set[str] = set()


class AllowedPaths:
    """The prefixes below which paths may lie, and the schemes of URLs that are opened anywhere. Without prefixes every
    local path will do."""

    def __init__(self, prefixes: Iterable[str] = (), schemes: Iterable[str] = ()):
        self._prefixes = [prefix.strip() for prefix in prefixes if prefix.strip()]
        self._schemes = {scheme.strip().lower() for scheme in schemes if scheme.strip()}

    @classmethod
    def of_environment(cls, *more: str) -> AllowedPaths:
        """What the two variables say, and `more` prefixes, which do not matter where GRADSTREAM_PATHS says nothing."""
        prefixes = [prefix for prefix in os.environ.get(VARIABLE, "").split(",") if prefix.strip()]
        return cls([*prefixes, *more] if prefixes else [], os.environ.get(SCHEMES_VARIABLE, "").split(","))

    def check(self, key: str, path: str | None) -> None:
        """Raise ConfigError, which names the recipe's key, for a path that leads elsewhere. Links are followed, which
        may take as long as their storage takes: not for an event loop."""
        if path is not None and not self._allows(path):
            raise ConfigError(f"{key} {self._refusal(path)}")

    def check_opened(self, path: str, descriptor: int) -> None:
        """Raise ConfigError when the open file that `path` led to lies elsewhere: the last word, where a link has been
        changed since `path` was checked."""
        if self._prefixes:
            found = _place_of(path, descriptor)
            if not any(_is_below(found, prefix) for prefix in (*self._prefixes, *_own)):
                raise ConfigError(f"{path} leads to {found}, which is not below {self._listed()}; put the file there")

    def _allows(self, path: str) -> bool:
        scheme = scheme_of(path)
        if scheme is None:
            return not self._prefixes or any(_is_below(path, prefix) for prefix in self._prefixes)
        # In fsspec's chains one path is opened through another: none of them says where it leads.
        return "::" not in path and (
            scheme in self._schemes or any(_is_below_url(path, prefix) for prefix in self._prefixes)
        )

    def _refusal(self, path: str) -> str:
        if self._prefixes:
            return f"{path} is not below {self._listed()}, where this cluster's paths must lie; put it there"
        return (
            f"{path} is a URL, and this service opens local paths alone; name a directory that it can see, or have its "
            f"operator allow the scheme ({SCHEMES_VARIABLE}) or a URL to begin with ({VARIABLE})"
        )

    def _listed(self) -> str:
        return " or ".join(self._prefixes)


def check_scheme(path: str) -> None:
    """In a service that takes recipes from others (GRADSTREAM_SCHEMES is set, if only to nothing), raise ConfigError
    for a URL that may not be opened, wherever it was read."""
    if SCHEMES_VARIABLE in os.environ and scheme_of(path) is not None:
        AllowedPaths.of_environment().check("the path", path)


def restrict_process() -> None:
    """Make this process one that `check_scheme` speaks of, and keep libraries from fetching anything by a name that a
    config has."""
    os.environ.setdefault(SCHEMES_VARIABLE, "")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def own(directory: str) -> None:
    """Let this process read below a directory of its own, whatever GRADSTREAM_PATHS says."""
    _own.add(os.path.realpath(directory))


def scheme_of(path: str) -> str | None:
    """The scheme of a URL, as fsspec would open it, in lower case; None for a path of this machine."""
    if "::" in path:
        return "::"
    match = _SCHEME.match(path)
    scheme = path.partition("://")[0] if "://" in path else match[1] if match else ""
    scheme = scheme.lower()
    return None if not scheme or scheme in LOCAL_SCHEMES else scheme


def local_of(path: str) -> str:
    """A path of this machine without its scheme."""
    for scheme in LOCAL_SCHEMES:
        if path.lower().startswith(f"{scheme}:"):
            return path[len(scheme) + 1 :].removeprefix("//")
    return path


def _is_below(path: str, prefix: str) -> bool:
    """Whether a path of this machine really lies below a prefix."""
    if scheme_of(prefix) is not None or "\0" in path:
        return False
    try:
        found = os.path.realpath(os.path.expanduser(local_of(path)))
        root = os.path.realpath(local_of(prefix))
    except (OSError, ValueError):
        return False
    return os.path.commonpath([found, root]) == root


def _is_below_url(path: str, prefix: str) -> bool:
    # A server may read "%2e%2e" as "..", and some take "\" for "/".
    plain = unquote(unquote(path)).replace("\\", "/")
    return (
        scheme_of(prefix) is not None
        and ".." not in plain.split("/")
        and f"{path}/".startswith(f"{prefix.rstrip('/')}/")
    )


def _place_of(path: str, descriptor: int) -> str:
    """Where an open file lies, as the kernel says; where it cannot, as the path says now."""
    try:
        found = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return os.path.realpath(path)
    return found.removesuffix(" (deleted)")
