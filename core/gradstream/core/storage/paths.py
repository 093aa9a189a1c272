"""The paths that a recipe may name.

A submitter names paths that services then read and write. By default a service opens only local paths, because a URL
would make the service connect to a host of the submitter's choice. Two environment variables change this:

- GRADSTREAM_PATHS: directories and URLs, separated by commas. Every path of a recipe must lie below one of them. This
  keeps files that a service can open from submitters who must not see them, such as the service's own key.
- GRADSTREAM_SCHEMES: schemes of URLs, separated by commas, that may be opened wherever they lead ("s3,gs").

A path is checked when it is submitted. Every file is checked again when it is opened, by its real location, because a
link may have replaced it since.
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

# This process's own directories: it reads files there that it has written itself.
_own: set[str] = set()


class AllowedPaths:
    """The prefixes below which paths may lie, and the schemes of URLs that may be opened anywhere.

    Without prefixes every local path is allowed.
    """

    def __init__(self, prefixes: Iterable[str] = (), schemes: Iterable[str] = ()):
        self._prefixes = [prefix.strip() for prefix in prefixes if prefix.strip()]
        self._schemes = {scheme.strip().lower() for scheme in schemes if scheme.strip()}

    @classmethod
    def of_environment(cls, *more: str) -> AllowedPaths:
        """The allowed paths of the two variables. The prefixes `more` are added if GRADSTREAM_PATHS has any."""
        prefixes = [prefix for prefix in os.environ.get(VARIABLE, "").split(",") if prefix.strip()]
        return cls([*prefixes, *more] if prefixes else [], os.environ.get(SCHEMES_VARIABLE, "").split(","))

    def check(self, key: str, path: str | None) -> None:
        """Raise ConfigError, which names the recipe's key, for a path that is not allowed.

        Follows links, which blocks while their storage is slow: not for an event loop.
        """
        if path is not None and not self._allows(path):
            raise ConfigError(f"{key} {self._refusal(path)}")

    def check_opened(self, path: str, descriptor: int) -> None:
        """Raise ConfigError when the open file at `path` does not lie below a prefix.

        This check holds even if a link was changed after `path` was checked.
        """
        if self._prefixes:
            found = _place_of(path, descriptor)
            if not any(_is_below(found, prefix) for prefix in (*self._prefixes, *_own)):
                raise ConfigError(f"{path} leads to {found}, which is not below {self._listed()}; put the file there")

    def _allows(self, path: str) -> bool:
        scheme = scheme_of(path)
        if scheme is None:
            return not self._prefixes or any(_is_below(path, prefix) for prefix in self._prefixes)
        # Chains of fsspec ("::") are refused: one path is opened through another, so their target cannot be checked.
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
    """Raise ConfigError for a URL that a service must not open.

    Applies to services that take recipes from others: those with GRADSTREAM_SCHEMES set, even to an empty text.
    """
    if SCHEMES_VARIABLE in os.environ and scheme_of(path) is not None:
        AllowedPaths.of_environment().check("the path", path)


def restrict_process() -> None:
    """Mark this process as one that takes recipes from others (`check_scheme`).

    Also keeps Hugging Face's libraries from downloading a model by a name in a config.
    """
    os.environ.setdefault(SCHEMES_VARIABLE, "")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def own(directory: str) -> None:
    """Let this process read below its own directory, even if GRADSTREAM_PATHS does not include the directory."""
    _own.add(os.path.realpath(directory))


def scheme_of(path: str) -> str | None:
    """The scheme of a URL as fsspec reads it, in lower case; None for a local path."""
    if "::" in path:
        return "::"
    match = _SCHEME.match(path)
    scheme = path.partition("://")[0] if "://" in path else match[1] if match else ""
    scheme = scheme.lower()
    return None if not scheme or scheme in LOCAL_SCHEMES else scheme


def local_of(path: str) -> str:
    """A local path without its scheme."""
    for scheme in LOCAL_SCHEMES:
        if path.lower().startswith(f"{scheme}:"):
            return path[len(scheme) + 1 :].removeprefix("//")
    return path


def _is_below(path: str, prefix: str) -> bool:
    """Whether a local path, links followed, lies below a prefix."""
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
    """The real path of an open file: the kernel's answer, or else the path with its links followed."""
    try:
        found = os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return os.path.realpath(path)
    return found.removesuffix(" (deleted)")
