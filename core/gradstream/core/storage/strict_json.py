"""Strict parsing of small, untrusted JSON documents: a size limit, one object, no key twice, checked types."""

from __future__ import annotations

import json
from typing import Any

from gradstream.core.errors import ConfigError


def parse_object(data: bytes | str, max_bytes: int, what: str) -> dict[str, Any]:
    """Parse `data` as one JSON object. `what` names the document in messages ("the pack", a path).

    Raises ConfigError for anything else. A message never quotes `data`, which may hold secrets.
    """
    if len(data) > max_bytes:
        raise ConfigError(f"{what} has more than {max_bytes} bytes, which gradstream never writes; restore it")
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        found = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{what} is damaged: no JSON at line {error.lineno}, column {error.colno}") from None
    except (ValueError, RecursionError):
        # Not UTF-8, a number with thousands of digits, NaN, a key twice, or brackets nested thousands deep.
        raise ConfigError(f"{what} is damaged: no JSON as gradstream writes it") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{what} is damaged: not a JSON object")
    return found


def exact_keys(found: dict[str, Any], keys: dict[str, tuple[type, ...]], what: str) -> dict[str, Any]:
    """Check that `found` has exactly these keys, each with a value of one of its types; return `found`.

    A bool does not count as an int. Raises ConfigError.
    """
    for key, types in keys.items():
        if key not in found:
            raise ConfigError(f"{what} is damaged: it has no '{key}'")
        if type(found[key]) not in types:
            raise ConfigError(f"{what} is damaged: '{key}' is a {type(found[key]).__name__}")
    if len(found) != len(keys):
        raise ConfigError(f"{what} is damaged: it has keys that gradstream does not know; was it made by a newer one?")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key twice")
    return made


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
