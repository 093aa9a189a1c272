"""Tokens that a tokenizer has beside its vocabulary, as the files beside its tokenizer.json name them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradstream.core.errors import ConfigError

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
ADDED_TOKEN_FIELDS = ("lstrip", "rstrip", "single_word", "normalized")


def extra_special_tokens(settings: Mapping[str, Any]) -> list[Any]:
    """Special tokens beside the named ones, each its text or an object with it."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    values = extra.values() if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    return [value for value in values if isinstance(value, str) or (isinstance(value, dict) and "content" in value)]


def added_tokens(added: Any, settings: Mapping[str, Any], directory: str) -> dict[int, Any]:
    """Added tokens by their ids. Raises ConfigError when they are no tokens."""
    from tokenizers import AddedToken

    named = [value for key, value in settings.items() if key in NAMED] + extra_special_tokens(settings)
    special = [value.get("content") if isinstance(value, dict) else value for value in named]
    found: dict[int, Any] = {}
    entries: list[tuple[Any, Any]] = list(added.items()) if isinstance(added, dict) else [("", None)]
    for number, fields in entries:
        try:
            options = {key: fields[key] for key in ADDED_TOKEN_FIELDS if key in fields}
            is_special = bool(fields.get("special", fields["content"] in special))
            token = AddedToken(fields["content"], **{"normalized": not is_special, **options, "special": is_special})
            found[int(number)] = token
        except (TypeError, ValueError, KeyError, AttributeError):
            raise ConfigError(
                f"the added token {str(number)[:40]!r} of {directory} is no token; get its files again"
            ) from None
    return found
